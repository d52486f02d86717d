"""What does accuracy cost? The demo's toy student, with class attention in cheaper and dearer forms, at equal steps and at equal time.

    python frontier.py run --seeds 5 --out FOLDER           appends a row a training to FOLDER/frontier.csv
    python frontier.py run --seeds 5 --out FOLDER --equal   each form once more, for as many epochs as pixel KD's time allows
    python frontier.py run --seeds 1 --forms 'pixel KD,channel KD' --keep FOLDER --out FOLDER    these forms, and the students
    python frontier.py table --out FOLDER

The recipe is camkd-demo's. `cpu` counts the seconds of the process on one thread, the loading of the images included; a run
that was stopped goes on where it was. Rows that exist are kept, so the second command takes its times from the first one's.
"""
import argparse, csv, os, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')
from pathlib import Path

import pandas as pd, torch
from fastai.torch_core import set_seed

from camkd_nb.distill import Distill
from camkd_nb.evaluate import evaluate
from camkd_nb.losses import ChannelKD, ClassAttention, PixelKD
from camkd_nb.models import toy_student, toy_teacher
from camkd_nb.toyvoc import toy_voc
from camkd_nb.training import Recipe, fit

EPOCHS = 40
def attention(**options): return lambda: [ClassAttention(.2, **options)]
FORMS = {
    'none': list,
    'pixel KD': lambda: [PixelKD()],
    'channel KD': lambda: [ChannelKD()],
    'class attention': attention(),
    'every 2nd batch': attention(every=2),
    'one class': attention(max_classes=1),
    'first order': attention(second_order=False),
    'every 2nd batch & first order': attention(every=2, second_order=False),
    'every 2nd batch & one class': attention(every=2, max_classes=1),
    'every 4th batch': attention(every=4),
    'one class & first order': attention(max_classes=1, second_order=False),
    'absent classes too': attention(absent=True, region='all'),
    'absent classes too & every 2nd batch': attention(absent=True, region='all', every=2),
    'channel KD + class attention': lambda: [ChannelKD(), ClassAttention(.2)],
    'channel KD + class attention & every 4th batch': lambda: [ChannelKD(), ClassAttention(.2, every=4)],
}

def rows_of(file): return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=['form', 'seed', 'epochs', 'miou', 'cpu'])

def kept(student): return {key: value.half() if value.is_floating_point() else value for key, value in student.state_dict().items()}

def train(form, seed, epochs, tree, teacher, keep=None):
    "One row: the student's mIoU in points, and the seconds of its training."
    recipe = Recipe(tree, size=64, epochs=epochs, device='cpu')
    set_seed(seed, reproducible=True)
    student, terms = toy_student(), FORMS[form]()
    start = time.process_time()
    fit(student, recipe, seed, cbs=[Distill(teacher, terms)] if terms else [], label=f'{form}, seed {seed}')
    seconds = time.process_time() - start
    if keep: torch.save(kept(student), keep/f'{form}, {epochs} epochs, seed {seed}.pth')
    return [form, seed, epochs, round(100 * evaluate(student, tree, progress=False).miou, 2), round(seconds, 1)]

def epochs_for_equal_time(rows):
    "Form -> epochs that take the time of pixel KD's forty; forms that differ by less than an epoch are left out."
    cpu = rows[rows.epochs == EPOCHS].pivot_table(index='seed', columns='form', values='cpu')
    ratio = cpu.div(cpu['pixel KD'], axis=0).median()
    return {form: n for form, n in (EPOCHS / ratio).round().astype(int).items() if n != EPOCHS}

def run(args):
    torch.set_num_threads(1)
    file, tree, teacher = args.out/'frontier.csv', toy_voc(n_train=400, n_valid=200), toy_teacher(pretrained=True)
    epochs = epochs_for_equal_time(rows_of(file)) if args.equal else dict.fromkeys(FORMS, EPOCHS)
    if args.keep: args.keep.mkdir(parents=True, exist_ok=True)
    if args.forms: epochs = {form: n for form, n in epochs.items() if form in args.forms.split(',')}
    for seed in range(args.first, args.seeds):
        for form, n in epochs.items():
            rows = rows_of(file)
            near = rows[(rows.form == form) & (rows.seed == seed) & ((rows.epochs != EPOCHS) if args.equal else (rows.epochs == EPOCHS))]
            if len(near): continue
            row, new = train(form, seed, n, tree, teacher, args.keep), not file.exists()
            with open(file, 'a', newline='') as f: csv.writer(f, lineterminator='\n').writerows(([list(rows)] if new else []) + [row])

def table(args):
    rows = rows_of(args.out/'frontier.csv')
    same = rows[rows.epochs == EPOCHS].pivot_table(index='seed', columns='form', values=['miou', 'cpu'])
    gain, ratio = same.miou.sub(same.miou['none'], axis=0), same.cpu.div(same.cpu['pixel KD'], axis=0).median()
    other = rows[rows.epochs != EPOCHS].pivot_table(index='seed', columns='form', values='miou')
    at_equal_time = other.sub(same.miou['none'], axis=0)
    names = [f for f in FORMS if f in gain]
    print(pd.DataFrame({'time / pixel KD': ratio, 'gain': gain.mean(), 'least': gain.min(), 'seeds': gain.count(), 'minus class attention': gain.sub(gain['class attention'], axis=0).mean(),
                        'its s.e.': gain.sub(gain['class attention'], axis=0).sem(), 'gain at equal time': at_equal_time.mean()}).reindex(names).round(2).to_string())

def main():
    made = argparse.ArgumentParser()
    add = made.add_argument
    add('what', choices=('run', 'table')), add('--out', type=Path, default=Path('.')), add('--equal', action='store_true')
    add('--first', type=int, default=0), add('--seeds', type=int, default=5)
    add('--forms', help='some of the forms, with commas; else all'), add('--keep', type=Path, help='folder for the students')
    args = made.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run(args) if args.what == 'run' else table(args)

if __name__ == '__main__': main()
