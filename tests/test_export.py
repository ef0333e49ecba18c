"""Compiled, traced, exported and fused models compute what they do as they are."""

import copy
import re
import shutil

import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import cbn_mmdet
from cbn_mmdet import BRN, CBN, link, set_window, step, to_batchnorm, window_state

# torch warns of its first exporter, but its old versions need that exporter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:DeprecationWarning",
    "ignore:You are using the legacy:DeprecationWarning",
    "ignore::FutureWarning:copyreg",
)


def images(count=2, seed=0):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), CBN(6), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(6, 6, 3, groups=2, bias=False),
            CBN(6, window="sliding", window_size=3),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1),
            CBN(4, window_size=3, backward="window"),
        )
        # BRN refuses to be checkpointed.
        self.head = nn.Sequential(
            nn.Conv2d(4, 4, 1), BRN(4, warmup=0, r_end=3, d_end=3), nn.Conv2d(4, 2, 1)
        )

    def forward(self, x):
        x = self.stem(x)
        if self.checkpointed:
            return self.head(checkpoint(self.block, x, use_reentrant=False))
        return self.head(self.block(x))


def train(model, run, steps=6):
    """Trains with a burn-in, an open window, an evaluation between; returns all outputs."""
    link(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs = []
    for iteration in range(steps):
        set_window(model, 1 if iteration < 2 else None)
        optimizer.zero_grad()
        outputs.append(run(images(seed=iteration)))
        (outputs[-1] - 1).square().mean().backward()
        optimizer.step()
        step(model)
        if iteration == 3:
            model.eval()
            outputs.append(run(images(seed=99)))
            model.train()
    return [output.detach() for output in outputs]


def trained():
    model = Model()
    train(model, model)
    return model.eval()


class TestCompile:
    @pytest.fixture(autouse=True)
    def afresh(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("backend", "checkpointed"),
        [
            ("eager", False),
            ("eager", True),
            ("aot_eager", False),
            pytest.param("inductor", True, marks=pytest.mark.slow),
        ],
    )
    def test_training(self, backend, checkpointed):
        plain, model = Model(), Model(checkpointed)
        expected = train(plain, plain)
        outputs = train(model, torch.compile(model, backend=backend))
        close = dict(rtol=0, atol=1e-5 if backend == "inductor" else 0)
        torch.testing.assert_close(outputs, expected, **close)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), **close)
        assert cbn_mmdet.links(model) == cbn_mmdet.links(plain)
        for name, layer in (("stem.1", plain.stem[1]), ("block.1", plain.block[1])):
            (ours,), (theirs,) = window_state(model)[name], window_state(plain)[name]
            assert ours["seen"] == theirs["seen"] == 4 and layer.window_bytes > 0
            torch.testing.assert_close(ours["h"], theirs["h"], **close)

    def test_what_a_graph_ends_at(self):
        """Modules with a weight and CBN run in Python; the operations between them are compiled."""

        class Straight(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
                self.norm, self.last = CBN(4), CBN(4)

            def forward(self, x):
                x = self.norm(self.first(x.cos().sin()))
                x = self.last(self.second(x.relu() + 1))
                return x.tanh().neg()

        graphs = []

        def note(graph, _):
            calls = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
            graphs.append([getattr(call, "__name__", call) for call in calls])
            return graph.forward

        model = Straight()
        link(model)
        compiled = torch.compile(model, backend=note)
        for number in range(3):
            compiled(images(seed=number)).sum().backward()
            step(model)
        # The last operations read nothing that changes between iterations: nothing is recompiled.
        graphs = [each for each in graphs if each != ["conv2d"]]  # compiled alone by torch 2.14
        assert graphs == [["cos", "sin"], ["relu", "add"], ["tanh", "neg"]]
        assert cbn_mmdet.links(model) == {"norm": "first", "last": "second"}

    def test_why_a_graph_ends(self):
        """The compiler sees each part left to Python as one call, and traces none of it."""
        widths, blocks = range(3, 11), []
        for width in widths:  # unequal, so that no two share what is compiled
            blocks += [nn.Conv2d(width, width + 1, 1), CBN(width + 1)]
        model = nn.Sequential(*blocks)
        link(model)
        compiled = torch.compile(model, backend="eager")
        torch._dynamo.utils.counters.clear()
        for number in range(3):
            compiled(images(seed=number)).sum().backward()
            step(model)
        reasons = torch._dynamo.utils.counters["graph_break"]
        assert len(reasons) == 2
        for name in ("Hook.__call__", "CBN._train"):
            assert any(f"`{name}` should not be traced" in reason for reason in reasons)

    def test_evaluation_is_one_graph(self):
        """For a model that was never linked, and for one that ``to_batchnorm`` unlinked."""
        for model in (Model().eval(), to_batchnorm(trained())):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            assert torch.equal(compiled(images()), model(images()))


class TestTorchScript:
    @pytest.mark.parametrize("linked", [False, True])
    def test_trace(self, linked):
        model = trained() if linked else Model().eval()
        traced = torch.jit.trace(model, images())
        kinds = [node.kind() for node in traced.inlined_graph.nodes()]
        assert kinds.count("aten::batch_norm") == 4
        assert torch.equal(traced(images(5, seed=9)), model(images(5, seed=9)))

    def test_refuses_to_trace_a_training_step(self):
        model = trained().train()
        with pytest.raises(RuntimeError, match=r"'stem.1' \(CBN\): .*model.eval\(\)"):
            torch.jit.trace(model, images())

    def test_refuses_to_script(self):
        model = trained()
        with pytest.raises(RuntimeError, match=r"'stem.1' \(CBN\): .*to_batchnorm\(model\)"):
            torch.jit.script(model.stem)

    def test_script_of_what_to_batchnorm_left(self):
        model = to_batchnorm(trained()).stem
        assert torch.equal(torch.jit.script(model)(images()), model(images()))


class TestOnnx:
    @pytest.mark.parametrize("linked", [False, True])
    @pytest.mark.parametrize("dynamo", [False, True])
    def test_agrees_with_torch(self, tmp_path, dynamo, linked):
        model = trained() if linked else Model().eval()
        torch.onnx.export(model, (images(),), tmp_path / "model.onnx", dynamo=dynamo)
        graph = onnx.load(tmp_path / "model.onnx")
        onnx.checker.check_model(graph)
        assert {node.op_type for node in graph.graph.node} <= {
            "Conv",
            "Relu",
            "BatchNormalization",
        }
        assert not {node.domain for node in graph.graph.node} - {"", "ai.onnx"}
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (output,) = session.run(None, {session.get_inputs()[0].name: images(seed=9).numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(images(seed=9)).detach())

    def test_has_batch_normalization_where_nothing_is_folded(self, tmp_path):
        path = tmp_path / "model.onnx"
        torch.onnx.export(CBN(3).eval(), (images(),), path, dynamo=False)
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("BatchNormalization") == 1
        assert set(kinds) <= {"BatchNormalization", "Identity"}

    @pytest.mark.parametrize("dynamo", [False, True])
    def test_refuses_a_training_step(self, tmp_path, dynamo):
        model = trained().train()
        with pytest.raises(Exception) as refusal:
            torch.onnx.export(
                model,
                (images(),),
                tmp_path / "model.onnx",
                training=torch.onnx.TrainingMode.TRAINING,
                do_constant_folding=False,
                dynamo=dynamo,
            )
        assert "'stem.1' (CBN): only its evaluation" in str(refusal.value)


@pytest.fixture(scope="module")
def detectors():
    """The digits detector with CBN after a training step, and its twin with BN."""
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    folder = ROOT / "studies/digits/configs"
    models = []
    for norm in ("cbn", "bn"):
        cfg = Config.fromfile(folder / f"faster-rcnn_r18_fpn_{norm}-all_1xb2_digits.py").model
        cfg.test_cfg.rcnn.score_thr = 0.0  # of a model that has learnt next to nothing
        models.append(MODELS.build(cfg))
    cbn, bn = models
    cbn.train()
    link(cbn)
    data = cbn.data_preprocessor(demo_mm_inputs(2, (3, 64, 64), num_classes=10), True)
    sum(map(_total, cbn(**data, mode="loss").values())).backward()
    step(cbn)
    bn.load_state_dict(cbn.state_dict(), strict=True)
    return cbn.eval(), bn.eval()


def _total(loss):
    return loss.sum() if isinstance(loss, torch.Tensor) else sum(each.sum() for each in loss)


@torch.no_grad()
def detections(model):
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(1, (3, 64, 64), num_classes=10)
    (sample,) = model(**model.data_preprocessor(data, False), mode="predict")
    assert len(sample.pred_instances) > 0
    return sample.pred_instances


class TestFusion:
    def test_same_detections(self, detectors):
        from mmcv.cnn import fuse_conv_bn

        fused = [fuse_conv_bn(copy.deepcopy(model)) for model in detectors]
        first, second = map(detections, fused)
        for name in ("bboxes", "scores", "labels"):
            assert torch.equal(first[name], second[name]), name
        assert not any(isinstance(module, CBN) for module in fused[0].modules())
        x = torch.randn(1, 3, 64, 64)
        for fast, slow in zip(fused[0].extract_feat(x), detectors[0].extract_feat(x), strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)

    def test_torch(self):
        conv, norm = nn.Conv2d(3, 6, 3), CBN(6)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
        model = nn.Sequential(conv, norm).eval()
        twin = to_batchnorm(copy.deepcopy(model))
        fused = fuse_conv_bn_eval(conv, norm)
        assert torch.equal(fused(images()), fuse_conv_bn_eval(*twin)(images()))
        torch.testing.assert_close(fused(images()), model(images()))


class TestDocs:
    """The examples of docs/deploy.md run as they stand, beside one another in one folder."""

    TEXT = (ROOT / "docs" / "deploy.md").read_text()

    def run(self, part, folder, monkeypatch):
        monkeypatch.chdir(folder)
        blocks = re.findall(r"```python\n(.*?)```", self.TEXT, re.DOTALL)
        (block,) = [block for block in blocks if part in block]
        scope = {}
        exec(block, scope)
        return scope

    def test_to_batchnorm(self, tmp_path, monkeypatch):
        model = self.run("to_batchnorm(", tmp_path, monkeypatch)["model"]
        loaded = torch.load("model.pt", weights_only=False)
        assert type(loaded[1]) is nn.BatchNorm2d
        assert torch.equal(loaded(images()), model(images()))

    def test_export(self, tmp_path, monkeypatch):
        scope = self.run("torch.onnx.export(", tmp_path, monkeypatch)
        assert (tmp_path / "model.onnx").exists()
        torch.testing.assert_close(scope["traced"](scope["image"]), scope["model"](scope["image"]))

    def test_from_batchnorm(self, tmp_path, monkeypatch):
        model = self.run("from_batchnorm(", tmp_path, monkeypatch)["model"]
        assert len(cbn_mmdet.links(model)) == 20

    @pytest.mark.slow
    def test_publish(self, tmp_path, monkeypatch, root, small_config, digits, tool, capsys):
        """With a checkpoint of the detector that was never trained, and an image of a digit."""
        from mmdet.registry import MODELS
        from mmengine.config import Config
        from mmengine.registry import init_default_scope

        init_default_scope("mmdet")
        cfg = Config.fromfile(small_config(tmp_path, "faster-rcnn_r18_fpn_cbn-all_1xb2_digits"))
        cfg.model.test_cfg.rcnn.score_thr = 0.0
        folder = tmp_path / "work_dirs" / "my_config"
        folder.mkdir(parents=True)
        meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=tuple("0123456789")))
        state = MODELS.build(cfg.model).state_dict()
        torch.save(dict(meta=meta, state_dict=state), folder / "epoch_12.pth")
        shutil.copy(next((digits / "val").iterdir()), tmp_path / "image.png")
        (command,) = re.findall(r"```bash\npython (.*?)\n```", self.TEXT)
        name, path = command.split()
        tool(name.removeprefix("tools/"), tmp_path / path)
        self.run("init_detector(", tmp_path, monkeypatch)
        assert "tensor([[" in capsys.readouterr().out
