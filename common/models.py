"""The ID models by the names that --model takes: a new one is a file of its own and a line here."""
import sys

from common.bert4rec import BERT4Rec, BERT4RecTied
from common.files import UserError, load_pt
from common.gru4rec import GRU4Rec
from common.runs import changed_code, read_row
from common.sasrec import SASRec
from common.sequence import ItemTable

MODELS = {'sasrec': SASRec, 'bert4rec': BERT4Rec, 'bert4rec-tied': BERT4RecTied,
          'gru4rec': GRU4Rec}


def load_seq(folder, data):
    """The model, in evaluation mode, of a run of train_seq.py. UserError: of other data."""
    path = folder / 'model.pt'
    content = load_pt(path, 'seq')
    files = changed_code(read_row(folder))
    if files:
        print(f"note: {folder.name} was made by other code than today's ({', '.join(files)})",
              file=sys.stderr)
    about = content['about']
    state = content['model']
    if content['data'] != data.fingerprint:
        raise UserError(f'{path}: was trained on another version of {data.name}')
    table = ItemTable(state['item_embedding.weight'], state.get('item_embedding.text'))
    try:
        model = MODELS[about['model']](table, about['max_items'])
        model.load_state_dict(state)
    except (KeyError, RuntimeError):  # a model that is gone, other layers
        raise UserError(f"{path}: is of another {about['model']} than today's") from None
    return model.eval()
