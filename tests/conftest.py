"""Tests are about a CPU, which gives the same bits on every run: they see no GPU. With --gpu the
others run, which have 'cuda' in their names."""
import os


def pytest_addoption(parser):
    parser.addoption('--gpu', action='store_true', help='the tests that need CUDA, and no others')


def pytest_configure(config):
    if not config.getoption('--gpu'):
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # of the commands that tests start, too


def pytest_collection_modifyitems(config, items):
    if config.getoption('--gpu'):
        items[:] = [item for item in items if 'cuda' in item.nodeid]
