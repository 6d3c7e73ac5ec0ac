"""The ID models by the names that --model takes: a new one is a file of its own and a line here."""
from pathlib import Path

from common.bert4rec import BERT4Rec
from common.files import UserError, load_pt
from common.gru4rec import GRU4Rec
from common.sasrec import SASRec

MODELS = {'sasrec': SASRec, 'bert4rec': BERT4Rec, 'gru4rec': GRU4Rec}


def load_seq(folder, data):
    """(model in evaluation mode, what it is) of a run of train_seq.py. UserError: of other data."""
    path = Path(folder) / 'model.pt'
    content = load_pt(path, 'seq')
    about, state = content['about'], content['model']
    if content['data'] != data.fingerprint:
        raise UserError(f'{path}: was trained on another version of {data.name}')
    kind = MODELS[about['model']]
    model = kind(state['item_embedding.weight'], True, state.get('item_embedding.text'),
                 max_items=about['max_items'])
    model.load_state_dict(state)
    return model.eval(), about
