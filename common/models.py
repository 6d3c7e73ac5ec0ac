"""The ID models by the names that --model takes: a new one is a file of its own and a line here."""
from common.bert4rec import BERT4Rec
from common.gru4rec import GRU4Rec
from common.sasrec import SASRec

MODELS = {'sasrec': SASRec, 'bert4rec': BERT4Rec, 'gru4rec': GRU4Rec}
