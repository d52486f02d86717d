"Where the real Pascal VOC 2012 lies beside a checkout."
import os
from pathlib import Path


def real_data_environment():
    "Let CAMKD_VOC name `shared/data/VOCdevkit/VOC2012` of the checkout or the nearest folder above it, unless it is set"
    checkout = Path(__file__).resolve().parents[1]
    trees = (folder/'shared/data/VOCdevkit/VOC2012' for folder in (checkout, *checkout.parents))
    tree = next((tree for tree in trees if tree.is_dir()), None)
    if tree and not os.environ.get('CAMKD_VOC'): os.environ['CAMKD_VOC'] = str(tree)
