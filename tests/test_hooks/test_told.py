"""What the hook reports about a model: calls too far apart, norms that are not CBN."""

import pytest
from test_hooks.test_cbn_hook import evaluation, log_of, runner
from torch import nn

from cbn_mmdet import CBN, diagnose


class Levels(nn.Module):
    """A head that is shared by levels of different scale, or one norm for each."""

    def __init__(self, scales, is_separate=False):
        super().__init__()
        self.scales, self.conv = scales, nn.Conv2d(4, 4, 1)
        norms = [CBN(4, window_size=4) for _ in scales]
        self.norms = nn.ModuleList(norms if is_separate else norms[:1] * len(scales))

    def forward(self, x):
        levels = zip(self.scales, self.norms, strict=True)
        return sum(norm(self.conv(x * scale + scale)) for scale, norm in levels)


class TestOneNormOnSeveralLevels:
    """mmdetection#6515: five windows, but one set of running statistics for evaluation."""

    def run(self, folder, levels, epochs=2):
        loop = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
        hook = dict(type="CBNHook", burn_in=0)
        run, _ = runner(folder, hook, levels, loop=loop, **evaluation())
        run.train()
        told = [line for line in log_of(folder).splitlines() if "called several times" in line]
        return run.model, told

    def test_is_told_once_before_the_first_evaluation(self, tmp_path):
        model, (line,) = self.run(tmp_path, Levels([0.5, 1, 4]))
        apart = diagnose(model)["body.1.norms.0"].apart
        assert apart > 0.3
        assert "WARNING - CBNHook: 'body.1.norms.0' is called several times in a forward" in line
        assert " standard deviations apart. " in line and "give each call its own layer" in line
        log = log_of(tmp_path)
        assert log.index(line) < log.index("Epoch(val)")

    def test_waits_for_a_window(self, tmp_path):
        """In a burn-in there is nothing to look into."""
        loop = dict(by_epoch=True, max_epochs=2, val_interval=1)
        run, _ = runner(
            tmp_path, dict(type="CBNHook", burn_in=1), Levels([0.5, 4]), loop=loop, **evaluation()
        )
        run.train()
        before, after = log_of(tmp_path).split("called several times")
        assert "Epoch(val) [1]" in before and "Epoch(val) [2]" not in before

    @pytest.mark.parametrize("levels", [Levels([1, 1.05]), Levels([0.5, 1, 4], is_separate=True)])
    def test_is_not_told(self, tmp_path, levels):
        model, told = self.run(tmp_path, levels)
        assert told == [] and all(each.apart < 0.3 for each in diagnose(model).values())


@pytest.mark.parametrize("beside", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, None])
def test_batch_norms_that_no_norm_cfg_reaches(tmp_path, beside):
    """As CornerNet and CenterNet build them: the hook counts and names those that train."""
    norm = CBN(4, window_size=3)
    if beside is not None:
        other = beside(*((2, 4) if beside is nn.GroupNorm else (4,)))
        if beside is nn.SyncBatchNorm:  # it becomes BatchNorm2d on one process
            other = nn.BatchNorm2d(4)
        norm = nn.Sequential(norm, nn.Conv2d(4, 4, 1), other, nn.BatchNorm2d(4).eval())
        norm[3].train = lambda mode=True: norm[3]  # frozen
    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=0), norm, epochs=1)
    run.train()
    told = [line for line in log_of(tmp_path).splitlines() if "that are no CBN train" in line]
    if beside in (nn.GroupNorm, None):
        assert told == []
    else:
        (line,) = told
        assert "1 batch norms that are no CBN train beside 1 CBN layers. " in line
        assert "from_batchnorm turns them into CBN. They are 'body.1.2' (BatchNorm2d)." in line


def test_layers_that_are_not_compensated(tmp_path):
    """The hook names each of them, once."""
    norms = [CBN(4, window_size=3, compensate="where_possible") for _ in range(3)]
    activations = nn.Softmax(1), nn.Identity()
    norm = nn.Sequential(norms[0], activations[0], norms[1], activations[1], norms[2])
    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=0), norm, epochs=2)
    with pytest.warns(UserWarning, match="is not compensated"):
        run.train()
    (line,) = [each for each in log_of(tmp_path).splitlines() if "are not compensated" in each]
    assert "CBNHook: 2 CBN layers are not compensated, as compensate='where_possible'" in line
    assert line.endswith("allows: 'body.1.2', 'body.1.4'.")
