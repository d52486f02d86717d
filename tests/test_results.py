"The commands that the study's page gives: each script exists, and knows the options. The gains that the pages tell: they are those of the rows."
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from camkd_nb.study import interval, read_runs

root = Path(__file__).resolve().parents[1]
page = nbformat.read(root/'nbs/benchmarks/05_study.ipynb', as_version=4)
commands = [found for cell in page.cells if cell.cell_type == 'markdown' for found in re.findall(r'`python (nbs/results/\w+\.py) ([^`]*)`', cell.source)]


def test_every_script_has_its_command():
    assert {script for script, _ in commands} == {path.relative_to(root).as_posix() for path in (root/'nbs/results').glob('*.py')}


@pytest.mark.parametrize('script', sorted({script for script, _ in commands}))
def test_scripts_know_the_options_of_their_commands(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(root/'nbs/results')
    for what, options in {(rest.split()[0], tuple(re.findall(r'--[\w-]+', rest))) for name, rest in commands if name == script}:
        monkeypatch.setattr(sys, 'argv', [script, what, '--help'])
        with pytest.raises(SystemExit) as left: runpy.run_path(str(root/script), run_name='__main__')
        said = capsys.readouterr().out
        assert left.value.code == 0 and said.startswith('usage') and all(option in said for option in options)


# --- the numbers in the text of tutorial 03 and of the first page ---
def rows(file, setting=None): return read_runs(root/'nbs/results'/file, setting)


def check_gap(points, method, other, seeds, *numbers):
    "The difference over the first seeds that both have: its mean, and perhaps the ends of its interval."
    gap = (points[method] - points[other]).dropna()[:seeds]
    assert len(gap) == seeds
    assert [gap.mean(), *interval(gap)][:len(numbers)] == pytest.approx(numbers, abs=.06)


def frontier():
    found = pd.read_csv(root/'nbs/results/frontier.csv').rename(columns={'form': 'method'}).query('epochs == 40')
    return found.assign(miou=found.miou / 100)


SIGNED, BOTH = 'signed class attention', 'channel KD + signed class attention'
TOLD = {
    ('toy.csv', 'methods'): [
        (SIGNED, 'none', 5, 7.1, 5.2, 8.9), ('as by default', 'none', 3, 7.4, 3.7, 11.2), ('signed, first order', 'none', 3, 4.2, -1.0, 9.3),
        ('ReLU, first order', 'none', 3, 2.6, -8.1, 13.4), (SIGNED, 'shuffled maps', 5, 8.1, 2.6, 13.6), ('untrained teacher', 'none', 3, -14.1),
        (SIGNED, 'attention transfer', 5, 3.2, -2.6, 9.0), (SIGNED, 'pixel KD', 5, 2.0, -2.1, 6.2), ('channel KD', SIGNED, 5, 6.0, 2.7, 9.3),
        ('channel KD', 'student twice as wide', 3, 9.3), (SIGNED, 'student twice as wide', 3, 2.7, -3.2, 8.6), ('channel KD', 'none', 5, 13.1, 10.7, 15.4)],
    ('voc.csv', 'pspnet, 100 images'): [
        (SIGNED, 'none', 8, 1.8, .8, 2.8), (SIGNED, 'shuffled maps', 3, 4.0, 3.8, 4.2), (SIGNED, 'attention transfer', 3, 1.1, -.8, 3.1),
        (BOTH, 'none', 5, 3.9, 2.5, 5.2), (BOTH, 'channel KD', 5, 2.1, 1.6, 2.5), ('channel KD + as by default', 'none', 3, 3.6, -.2, 7.4),
        ('channel KD', 'none', 5, 1.8, 0, 3.6)],
    ('voc.csv', 'pspnet, 50 images, 40 epochs'): [(BOTH, 'channel KD', 3, 1.5, .6, 2.4)],
    ('voc.csv', 'pspnet, 311 images, 7 epochs'): [(BOTH, 'channel KD', 3, 1.2, -1.1, 3.5), (SIGNED, 'none', 3, 1.6, -1.5, 4.8)],
    ('voc.csv', 'pspnet, half untrained, 100 images'): [('channel KD', 'none', 3, 2.1, 1.3, 2.8), (SIGNED, 'none', 3, -1.0, -1.7, -.3)],
    ('voc.csv', 'deeplabv3, 100 images'): [
        (BOTH, 'channel KD', 3, 2.1, -.5, 4.7), ('attention transfer', 'none', 3, 3.1, 2.2, 4.0), (SIGNED, 'none', 3, 1.1, -1.4, 3.7)],
    ('small_student_gpu.csv', '311 + 550 labelled, 2500 steps'): [('channel KD', 'none', 2, 4.8, 3.0, 6.5)],
    ('frontier.csv', ''): [
        ('channel KD', 'class attention', 5, 7.9, -.4, 16.2), ('class attention', 'pixel KD', 5, 8.3, 3.1, 13.6), ('first order', 'class attention', 5, -13.5, -19.7, -7.3),
        ('every 2nd batch', 'class attention', 5, -5.5, -11.2, .2), ('one class', 'class attention', 5, -3.6, -7.5, .3),
        ('every 2nd batch & first order', 'class attention', 3, -12.7, -24.1, -1.4)],
}


@pytest.mark.parametrize('file, setting, told', [(*of, told) for of, all_told in TOLD.items() for told in all_told])
def test_gains_in_the_text_are_those_of_the_first_seeds(file, setting, told):
    "Rows that are appended later do not change them."
    method, other, seeds, *numbers = told
    points = 100 * (frontier() if file == 'frontier.csv' else rows(file, setting)).pivot(index='seed', columns='method', values='miou')
    check_gap(points, method, other, seeds, *numbers)


def test_unlabelled_photographs_against_the_labelled_ones_alone():
    more, alone = (100 * rows('voc.csv', setting).query('seed < 2').pivot(index='seed', columns='method', values='miou')
                   for setting in ('pspnet, 100 images and 211 without labels', 'pspnet, 100 images'))
    lift = more['channel KD'] - alone['channel KD']
    assert [*lift, lift.mean(), (more - alone)[SIGNED].mean()] == pytest.approx([8.5, 4.6, 6.5, -4.5], abs=.06)


tried = pd.read_json(root/'nbs/results/tuned_gpu.jsonl', lines=True, precise_float=True)


def test_best_weights_at_the_end_of_their_grids():
    tuning = tried[tried.tuning & (tried.method != 'none')]
    best = tuning.loc[tuning.groupby('method').miou.idxmax()].set_index('method').weight
    single = tuning[~tuning.method.str.contains(' [+] ')].astype({'weight': float}).groupby('method').weight
    inside = {name: single.min()[name] < best[name] < single.max()[name] for name in ('channel KD', 'feature KD', 'class attention')}
    assert inside == {'channel KD': False, 'feature KD': False, 'class attention': True}
    assert best['channel KD + class attention'] == [3, .07] and (100 * tuning[(tuning.method == 'channel KD') & tuning.weight.isin([3, 9])].miou).round(1).tolist() == [30.8, 30.9]
    first = tried[~tried.tuning].query('seed == 0').set_index('method').miou
    gains = 100 * (first - first['none'])
    assert gains[['channel KD', 'class attention', 'channel KD + class attention']].tolist() == pytest.approx([3.2, 2.6, .9], abs=.06)
    assert all(row.weight == best[row.method] for row in tried[~tried.tuning & (tried.method != 'none') & (tried.seed > 0)].itertuples())


@pytest.mark.parametrize('method, other, column, pairs, mean, low, high', [
    ('channel KD', 'none', 'miou', 4, 2.5, .8, 4.1), ('class attention', 'none', 'miou', 4, 1.4, 0., 2.7), ('feature KD', 'none', 'miou', 4, 2.0, -.5, 4.5),
    ('DIST', 'none', 'miou', 4, 1.8, -.4, 4.0), ('attention transfer', 'none', 'miou', 4, 1.1, -.8, 3.0), ('pixel KD', 'none', 'miou', 5, .4, -1.5, 2.3),
    ('channel KD + class attention', 'none', 'miou', 3, 3.2, -.2, 6.6), ('channel KD + class attention', 'channel KD', 'miou', 3, 1.0, .3, 1.6),
    ('channel KD', 'none', 'six', 4, .3, -3.8, 4.4), ('class attention', 'channel KD', 'six', 4, 1.9, .4, 3.4)])
def test_gains_at_tuned_weights(method, other, column, pairs, mean, low, high):
    six = 'cat', 'dog', 'horse', 'cow', 'sheep', 'person'
    once = tried[~tried.tuning & (tried.weight.map(str) != '[9, 0.2]')]
    points = 100 * once.assign(six=[sum(iou[name] for name in six) / 6 for iou in once.class_iou]).pivot(index='seed', columns='method', values=column)
    check_gap(points, method, other, pairs, mean, low, high)


def test_channel_kd_at_the_weight_that_it_has_in_the_pair():
    alone = rows('small_student_gpu.csv', '311 + 550 labelled, 2500 steps').query('method == "channel KD"').sort_values('seed')
    pair = tried[~tried.tuning & (tried.weight.map(str) == '[3, 0.07]')].sort_values('seed')
    assert (100 * alone.miou[:2]).tolist() == pytest.approx([35.6, 34.8], abs=.06)
    assert (100 * pair.miou[:3]).tolist() == pytest.approx([34.9, 33.5, 35.0], abs=.06)


def test_times_in_the_text_are_those_of_one_code():
    found = pd.read_csv(root/'nbs/results/frontier.csv')
    cpu = found.query('epochs == 40').pivot(index='seed', columns='form', values='cpu').loc[:2]
    ratio = cpu.div(cpu['pixel KD'], axis=0).median()
    told = [ratio['channel KD'], 1 - ratio['one class'] / ratio['class attention'], (cpu['class attention'] / cpu['none']).median()]
    assert told == pytest.approx([1.02, .11, 2.7], abs=.03)
    equal = pd.concat([found.query('epochs != 40').pivot(index='seed', columns='form', values='cpu'), cpu[['pixel KD', 'channel KD']]], axis=1).loc[:1]
    assert (equal.max(axis=1) < 1.2 * equal.min(axis=1)).all() and (equal.idxmax(axis=1) == 'none').all()


def test_gains_at_equal_time_in_the_text():
    found = pd.read_csv(root/'nbs/results/frontier.csv').query('seed < 5')
    ended = found.query('epochs != 40').pivot(index='seed', columns='form', values='miou')
    ended = ended.join(found.query('epochs == 40').pivot(index='seed', columns='form', values='miou')[['pixel KD', 'channel KD']])
    for form, told in {'none': (15.3, 9.8, 20.9), 'pixel KD': (8.0, 1.1, 14.8), 'channel KD': (24.2, 18.3, 30.2)}.items():
        gap = ended[form] - ended['class attention']
        assert [gap.mean(), *interval(gap)] == pytest.approx(told, abs=.06)


# --- photographs without labels ---
def photographs(file, column):
    "Points by seed and method, whose steps are in its name where they are not 1,500."
    found = pd.read_json(root/'nbs/results'/file, lines=True, precise_float=True).query('not tuning')
    found['method'] += [f' ({steps})' * (steps != 1500) for steps in found.steps]
    return 100 * found.assign(rest=(21 * found.miou - 6 * found.six) / 15).pivot(index='seed', columns='method', values=column)


WITHOUT_LABELS = {
    'unlabelled_cpu.jsonl': [
        ('channel KD', 'none', 'miou', 3, 1.9, -0.6, 4.5),
        ('channel KD + class attention', 'channel KD', 'miou', 3, 0.3, -0.7, 1.4),
        ('channel KD + DIST', 'none', 'miou', 3, 2.8, 0.7, 4.9),
        ('DIST', 'none', 'miou', 3, 0.3, -1.3, 1.8),
        ('DIST, unlabelled too', 'none', 'six', 3, 9.4, 6.8, 11.9),
        ('channel KD, unlabelled too', 'none', 'six', 3, 7.3, 1.9, 12.6),
        ('channel KD + DIST, unlabelled too', 'none', 'six', 3, 14.2, 9.0, 19.4),
        ('channel KD + DIST, unlabelled too', 'none', 'miou', 3, 4.9, 4.4, 5.4),
        ('none, pseudo-labels', 'none', 'six', 3, 15.0, 12.7, 17.3),
        ('channel KD, pseudo-labels', 'none', 'six', 3, 16.8, 12.8, 20.9),
        ('none, pseudo-labels', 'none', 'rest', 3, -5.9, -10.7, -1.2),
        ('channel KD, pseudo-labels', 'none', 'rest', 3, -4.8, -6.4, -3.3),
        ('none, pseudo-labels', 'none', 'miou', 3, 0.0, -3.7, 3.7),
        ('channel KD, pseudo-labels', 'none', 'miou', 3, 1.4, 0.2, 2.6),
        ('none, labels for all', 'none', 'six', 3, 14.8, 10.3, 19.4),
        ('none, labels for all', 'none', 'rest', 3, -6.5, -8.6, -4.5),
        ('channel KD (2330)', 'none', 'miou', 3, 5.0, 3.0, 7.0),
        ('channel KD (3150)', 'none', 'miou', 3, 4.9, 2.0, 7.8),
        ('channel KD + DIST, unlabelled too', 'channel KD (3150)', 'miou', 3, 0.0, -3.3, 3.3),
        ('channel KD + DIST, unlabelled too', 'channel KD (3150)', 'six', 3, 11.4, 9.8, 13.0),
        ('channel KD (3150)', 'channel KD + DIST, unlabelled too', 'rest', 3, 4.6, 0.2, 8.9),
        ('channel KD (2330)', 'channel KD + class attention', 'miou', 3, 2.7, -2.4, 7.8),
        ('class attention, unlabelled too', 'none', 'six', 3, 1.4, -2.9, 5.7),
        ('DIST + class attention, unlabelled too', 'DIST, unlabelled too', 'miou', 3, 0.1, -1.5, 1.7),
        ('DIST + class attention, unlabelled too', 'DIST, unlabelled too', 'six', 3, 0.8, -4.6, 6.2),
        ('channel KD + class attention', 'channel KD', 'miou', 5, 0.4, -0.7, 1.4),
        ('channel KD + class attention, labels for all', 'channel KD, labels for all', 'miou', 3, -0.2, -1.1, 0.7),
        ('none, pseudo-labels', 'none, labels for all', 'miou', 3, 0.5, -3.0, 3.9),
        ('none, pseudo-labels', 'none, labels for all', 'six', 3, 0.1, -4.2, 4.4),
        ('channel KD, pseudo-labels', 'none, pseudo-labels', 'miou', 3, 1.3, -3.3, 6.0),
        ('channel KD, pseudo-labels', 'none, pseudo-labels', 'six', 3, 1.9, -4.1, 7.8),
        ('class attention, pseudo-labels', 'none, pseudo-labels', 'miou', 3, 0.6, -3.5, 4.7),
        ('class attention, pseudo-labels', 'none, pseudo-labels', 'six', 3, 2.2, -2.8, 7.2),
        ('channel KD + class attention, pseudo-labels', 'channel KD, pseudo-labels', 'miou', 3, -0.7, -3.3, 1.9),
        ('channel KD + class attention, pseudo-labels', 'channel KD, pseudo-labels', 'six', 3, -0.4, -7.1, 6.2),
        ('channel KD, unlabelled too', 'channel KD', 'miou', 3, -0.9, -3.9, 2.0),
        ('channel KD, unlabelled too', 'channel KD', 'six', 3, 4.2, -0.4, 8.9),
        ('class attention, unlabelled too', 'class attention', 'miou', 3, 0.1, -0.9, 1.1),
        ('class attention, unlabelled too', 'class attention', 'six', 3, 1.1, -1.9, 4.1),
        ('DIST, unlabelled too', 'DIST', 'miou', 3, 3.4, 1.7, 5.1),
        ('DIST, unlabelled too', 'DIST', 'six', 3, 8.4, 7.5, 9.3),
        ('DIST, unlabelled too (2010)', 'DIST, unlabelled too', 'miou', 3, 0.2, -2.6, 2.9),
        ('DIST, unlabelled too (2010)', 'DIST, unlabelled too', 'six', 3, 1.6, -2.9, 6.1),
        ('DIST + class attention, unlabelled too', 'DIST, unlabelled too (2010)', 'miou', 3, -0.0, -3.8, 3.7),
        ('DIST + class attention, unlabelled too', 'DIST, unlabelled too (2010)', 'six', 3, -0.7, -9.1, 7.6),
        ('channel KD + DIST, unlabelled too', 'DIST, unlabelled too', 'miou', 3, 1.2, 0.7, 1.7),
        ('channel KD + DIST, unlabelled too', 'DIST, unlabelled too', 'six', 3, 4.8, 2.2, 7.5),
        ('channel KD + class attention', 'channel KD', 'six', 5, 0.3, -1.4, 2.0),
        ('channel KD + class attention, labels for all', 'channel KD, labels for all', 'six', 3, 1.3, -5.3, 7.9),
        ('channel KD + class attention, unlabelled too', 'channel KD, unlabelled too', 'miou', 3, -0.4, -6.0, 5.2),
        ('channel KD + class attention, unlabelled too', 'channel KD, unlabelled too', 'six', 3, -1.1, -8.7, 6.6)],
    'unlabelled_cpu_swapped.jsonl': [  # 321 photographs teach and 311 score
        ('channel KD + DIST, unlabelled too', 'none', 'miou', 3, 3.2, 2.1, 4.4),
        ('channel KD + DIST, unlabelled too', 'none', 'six', 3, 9.0, 4.1, 13.8),
        ('DIST, unlabelled too', 'none', 'miou', 3, 2.5, -1.5, 6.5),
        ('DIST, unlabelled too', 'none', 'six', 3, 3.9, -3.4, 11.2),
        ('channel KD (3150)', 'none', 'miou', 3, 3.2, -2.4, 8.9),
        ('channel KD (3150)', 'none', 'six', 3, 5.4, -4.4, 15.2),
        ('channel KD + DIST, unlabelled too', 'channel KD (3150)', 'miou', 3, -0.0, -6.6, 6.6),
        ('channel KD + DIST, unlabelled too', 'channel KD (3150)', 'six', 3, 3.5, -8.8, 15.8)],
}


@pytest.mark.parametrize('file, told', [(file, told) for file, all_told in WITHOUT_LABELS.items() for told in all_told])
def test_gains_from_photographs_without_labels(file, told):
    "The six classes that they show, and the rest: the other 14 and the background; rows that are appended later do not change them."
    method, other, column, seeds, *numbers = told
    check_gap(photographs(file, column), method, other, seeds, *numbers)


# --- the table of a GPU ---
def gpu_rows(title):
    "A table of gpu.md as lists of cells."
    part = (root/'nbs/results/gpu.md').read_text().split(f'### {title}')[1].split('###')[0]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in part.splitlines() if line.startswith('|')][2:]


def test_the_front_page_tells_the_table_of_the_gpu():
    told = next(cell.source for cell in nbformat.read(root/'nbs/index.ipynb', as_version=4).cells if 'On one GPU, an H100' in cell.source)
    steps = {row[0]: row for row in gpu_rows('Step')}
    assert f"takes {steps['class attention, float32'][2]} times a step of pixel-wise" in told
    pace = {row[0]: float(row[-1]) for row in gpu_rows('Training')}
    assert f"takes {pace['float32, CAMDistill'] / pace['float32, plain']:.1f} times a plain one" in told
    assert all(row[1] == '0' for row in gpu_rows('Waits') if 'Learner' not in row[0])
