"""`camkd-demo` answers mistakes before it trains, and keeps what is finished when it is stopped."""
import pytest
import torch

from camkd_nb import demo
from camkd_nb.models import toy_student

tiny = ['--epochs', '1', '--n-train', '16', '--size', '32', '--bs', '8']


@pytest.mark.parametrize('said, arguments', [
    ('nowhere', ['--data', 'nowhere']), ("no model 'pspnet_resnet19'", ['--student', 'pspnet_resnet19']),
    ("did you mean 'backbone.layer3'", ['--layers', 'backbone.layr3']), ('--weight -1.0: give 0 or more', ['--weight', '-1']),
    ('--epochs 0: give 1 or more', ['--epochs', '0']), ('--out result: no picture', ['--out', 'result']),
    ("No split 'vall'", ['--valid', 'vall']), ('the teacher gives 21 classes', ['--teacher', 'camkd_nb.models:pspnet'])])
def test_mistakes_are_answered_in_one_line_before_any_training(said, arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, 'fit', None)
    with pytest.raises(SystemExit) as end: demo.main(arguments)
    text = capsys.readouterr().err
    assert (end.value.code, text.startswith('camkd-demo: '), text.count('\n'), said in text) == (2, True, 1, True)


def test_what_is_finished_stays_when_the_second_seed_is_stopped(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'demo.png').write_bytes(b'an older picture')
    done, fit = [], demo.fit
    def impatient(*args, **kwargs):
        done.append(1)
        if len(done) == 4: raise KeyboardInterrupt
        return fit(*args, **kwargs)
    monkeypatch.setattr(demo, 'fit', impatient)
    monkeypatch.setattr(demo, '_examine', lambda *args: None)
    monkeypatch.setattr(demo, 'evaluate', lambda *args, **kwargs: type('Score', (), {'miou': .5}))
    with pytest.raises(SystemExit) as end: demo.main([*tiny, '--seeds', '3', '--out', 'demo.png'])
    out = capsys.readouterr()
    assert (end.value.code, out.err) == (130, 'camkd-demo: stopped, 1 of 3 seeds finished, no picture written\n')
    assert [line.split()[0] for line in out.out.splitlines()[-2:]] == ['seed', '0']
    assert (tmp_path/'demo.png').read_bytes() == b'an older picture'


def test_the_students_that_come_with_the_package_are_trained():
    plain, distilled = (toy_student(pretrained=name).state_dict() for name in ('plain', 'distilled'))
    assert set(plain) == set(toy_student().state_dict())
    assert not any(torch.equal(plain[name], distilled[name]) for name in plain if name.endswith('weight'))
