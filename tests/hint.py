"A term with parameters of its own, for several tests."
from torch import nn

from camkd_nb.terms import Term, paired_features


class Hint(Term):
    "The mean squared difference of features, through a 1 × 1 convolution (Romero et al. 2015)"
    name = 'hint'
    def __init__(self, weight=1., layers=None, width=128):
        super().__init__(weight, layers)
        self.width, self.adapter = width, nn.LazyConv2d(width, 1)

    def forward(self, step):
        (ours, theirs), = self.pairs.items()
        student, teacher = paired_features(step, ours, theirs)
        return nn.functional.mse_loss(self.adapter(student), teacher)
