"""Which convolution feeds which CBN, in plain models and stock mmdet detectors, and iterations."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from layers import assert_same, backward, descend, held, train_once
from mmdet.models import FCOSHead, RetinaHead, RetinaSepBNHead
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import loss_of, stock_model, total

import cbn_mmdet.norm
from cbn_mmdet import CBN, link, links, set_window, step, window_state
from cbn_mmdet.norm.layer import is_compiling
from cbn_mmdet.norm.reference import Reference


def images(seed=0, channels=3):
    return torch.randn(2, channels, 5, 5, generator=torch.Generator().manual_seed(seed))


class TestPlainModels:
    def test_sequential(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4), nn.ReLU(), nn.Conv2d(4, 2, 1), CBN(2))
        assert link(model) == 2
        assert links(model) == {}
        train_once(model, torch.randn(2, 3, 8, 8))
        assert links(model) == {"1": "0", "4": "3"}

    def test_a_scripted_part(self):
        """It takes no hook, and needs none unless a CBN follows it."""
        loss = torch.jit.script(nn.Conv2d(4, 2, 1))
        model = nn.ModuleDict(dict(body=nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4)), loss=loss))
        assert link(model) == 1
        model.loss(model.body(torch.randn(2, 3, 8, 8))).sum().backward()
        step(model)
        assert held(model) == {"body.1": [1]}

    def test_linking_twice_is_harmless(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
        assert link(model) == link(model) == 1
        assert len(model[0]._forward_hooks) == 1
        assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
        train_once(model, torch.randn(2, 3, 8, 8))
        assert links(model) == {"1": "0"}

    def test_order_of_registration_does_not_matter(self):
        class Crossed(nn.Module):
            """Convolutions and norms in lists of their own, used in another order."""

            def __init__(self):
                super().__init__()
                self.norms = nn.ModuleList(CBN(4) for _ in range(3))
                self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

            def forward(self, x):
                for conv, norm in ((2, 0), (0, 1), (1, 2)):
                    x = self.norms[norm](self.convs[conv](x))
                return x

        model = Crossed()
        link(model)
        train_once(model, torch.randn(2, 4, 5, 5))
        assert links(model) == {"norms.0": "convs.2", "norms.1": "convs.0", "norms.2": "convs.1"}

    def test_a_copy_that_runs_within_the_forward(self):
        """A teacher, say: copies carry the hooks."""

        class Student(nn.Sequential):
            def forward(self, x):
                y = self[0](x)
                self.teacher[0](x)
                return self[1](y)

        model = Student(nn.Conv2d(3, 4, 3), CBN(4))
        link(model)
        model.__dict__["teacher"] = [copy.deepcopy(nn.Sequential(*model)).eval()]
        for _ in range(2):
            train_once(model, torch.randn(2, 3, 8, 8))
            assert links(model) == {"1": "0"}
            link(model.teacher[0])

    def test_one_convolution_feeds_several_norms(self):
        class Fork(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.left, self.right = nn.Conv2d(3, 4, 1), CBN(4), CBN(4)

            def forward(self, x):
                y = self.conv(x)
                return self.left(y) + self.right(y)

        model = Fork()
        link(model)
        for _ in range(3):
            train_once(model, torch.randn(2, 3, 5, 5))
        assert links(model) == {"left": "conv", "right": "conv"}
        assert model.left.window_bytes == model.right.window_bytes > 0

    def test_a_container_or_identity_between_is_seen_through(self):
        model = nn.Sequential(
            nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Identity(), nn.Dropout(0.0).eval()),
            CBN(4),
        )
        model[0][2].train = lambda mode=True: None  # stays in evaluation mode
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        assert links(model) == {"1": "0.0.0"}

    def test_naive_cbn_may_follow_anything(self):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), CBN(4, compensate=False), nn.ReLU(), CBN(4, compensate=False)
        )
        link(model)
        train_once(model, images())
        assert links(model) == {"1": "0"}  # a ReLU has no weight, so no link
        assert held(model) == {"1": [1], "3": [1]}

    def test_links_are_of_the_last_run_in_training(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        with torch.inference_mode():
            model.eval()(images())
        assert links(model) == {}
        train_once(model, images())
        model.eval()[1](images(channels=4))
        assert links(model) == {"1": "0"}

    def test_links_of_a_window_of_one(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4, window_size=1))
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        assert links(model) == {"1": "0"}

    def test_a_link_is_of_the_last_run(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4, compensate=False))
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        model[1](torch.randn(2, 4, 5, 5))
        assert links(model) == {}

    def test_keyword_input(self):
        class Keyword(nn.Sequential):
            def forward(self, x):
                return self[1](self[0](input=x))

        model = Keyword(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        train_once(model, torch.randn(2, 3, 5, 5))
        assert links(model) == {"1": "0"}

    def test_mmcvs_own_convolution_is_a_plain_one(self):
        from mmcv.cnn import Conv2d

        model = nn.Sequential(Conv2d(3, 4, 3), CBN(4))
        link(model)
        train_once(model, torch.randn(2, 3, 8, 8))
        assert links(model) == {"1": "0"}


class TestMarks:
    """Marks on a tensor during a forward tell a norm which module returned it."""

    def model(self):
        """A linked model, and the outputs of its convolution with what rides on each."""
        model, seen = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4), nn.Conv2d(4, 4, 1)), []
        link(model)
        model[0].register_forward_hook(lambda *args: seen.append((args[2], dict(vars(args[2])))))
        return model, seen

    def check_clean(self, tensor):
        """The tensor has no mark; copies and pickles of it hold nothing of this package."""
        assert not vars(tensor)
        assert b"cbn_mmdet" not in pickle.dumps(tensor.detach())
        assert torch.equal(copy.deepcopy(tensor.detach()), tensor)

    def test_they_are_gone_after_the_forward(self):
        model, seen = self.model()
        output = model(images())
        ((inner, during),) = seen
        assert during
        for tensor in (inner, output):
            self.check_clean(tensor)

    def test_they_are_gone_after_a_forward_that_failed(self):
        model, seen = self.model()
        with pytest.raises(RuntimeError, match="expected input"):
            model[2].weight.data = model[2].weight.data[:, :2]
            model(images())
        self.check_clean(seen[0][0])

    def test_of_parts_they_are_gone_after_the_step(self):
        model, seen = self.model()
        model[1](model[0](images()))
        assert vars(seen[0][0])
        step(model)
        self.check_clean(seen[0][0])

    def test_there_are_none_in_evaluation(self):
        model, seen = self.model()
        model.eval()(images())
        assert not seen[0][1]

    @pytest.mark.parametrize(
        "module", [nn.ReLU(), nn.Identity(), nn.Sequential(nn.Tanh()), nn.MaxPool2d(2), CBN(3)]
    )
    def test_only_modules_with_a_weight_put_one(self, module):
        during, model = [], nn.Sequential(module, nn.Conv2d(3, 4, 1), CBN(4))
        module.compensate = False
        link(model)
        module.register_forward_hook(lambda *args: during.append(dict(vars(args[2]))))
        model(torch.randn(2, 3, 8, 8))
        assert during == [{}]

    def test_an_operation_in_place_takes_it_back(self):
        class InPlace(nn.Sequential):
            change = None

            def forward(self, x):
                y = self[0](x)
                if self.change is not None:
                    self.change(y)
                return self[1](y)

        model = InPlace(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        whole, part = nn.functional.relu_, lambda y: y[:, :1].zero_()
        for model.change in (whole, part):
            with pytest.raises(RuntimeError, match="'1'.*operation in place"):
                model(images())
        model.change = None
        assert model(images()).isfinite().all()

    def test_inputs_are_free_after_the_forward(self):
        """A held output does not hold the convolution's input."""
        inputs = []

        class Remember(nn.Module):
            def forward(self, x):
                x = x * 2
                inputs.append(weakref.ref(x))
                return x

        model = nn.Sequential(Remember(), nn.Conv2d(3, 4, 1), CBN(4), nn.Conv2d(4, 4, 1))
        link(model)
        output = model(images())
        output.sum().backward()
        step(model)
        gc.collect()
        assert inputs[0]() is None
        assert output.shape == (2, 4, 5, 5)

    def test_a_model_can_be_freed(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
        link(model)
        train_once(model, images())
        ref = weakref.ref(model[0])
        del model
        gc.collect()
        assert ref() is None


class Stages(nn.Module):
    """Has a ``loss`` method besides ``forward``, and can be made to fail in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4, window_size=4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), CBN(4, window_size=4))
        self.failure = None

    def forward(self, x):
        return self.loss(x)

    def loss(self, x):
        x = self.body(x)
        if self.failure is not None:
            raise self.failure
        return self.head(x).square().mean()


def stages(count=2, call=lambda model, x: model(x)):
    """A model after some iterations."""
    model = Stages()
    link(model)
    for number in range(count):
        iterate(model, number, call)
    return model


def iterate(model, seed, call=lambda model, x: model(x)):
    """Runs one iteration, then moves the weights."""
    model.zero_grad()
    call(model, images(seed)).backward()
    step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


class TestIterations:
    """What begins an iteration, what belongs to it, and what ends it."""

    def test_of_two_forwards_the_last_counts(self):
        twice, once = stages(), stages()
        twice(images(7))
        iterate(twice, 8), iterate(once, 8)
        assert_same(twice, once)
        assert held(twice) == {"body.1": [3], "head.1": [3]}

    @pytest.mark.parametrize("size", [None, 1])
    @pytest.mark.parametrize("kind", ["moving", "sliding"])
    @pytest.mark.parametrize("reentrant", [None, False, True])
    def test_of_each_branch_the_last_counts(self, reentrant, kind, size):
        """Several tasks, each with a forward of its own through its own layers, and one loss."""

        class Tasks(nn.Module):
            def __init__(self):
                super().__init__()
                self.branches = nn.ModuleList(
                    nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4, window=kind, window_size=4))
                    for _ in range(2)
                )

            def forward(self, x, *numbers):
                branches = [self.branches[number] for number in numbers]
                if reentrant is None or len(branches) == 2:
                    return [branch(x) for branch in branches]
                x.requires_grad_()
                return [checkpoint(branch, x, use_reentrant=reentrant) for branch in branches]

        apart = Tasks().double()
        together = copy.deepcopy(apart)
        for model in (apart, together):
            link(model)
            set_window(model, size)
        for number in range(4):
            x, dropped = images(number).double(), images(number + 9).double()
            outputs = together(x, 0, 1), [*apart(dropped, 1), *apart(x, 0), *apart(x, 1)]
            for model, found in zip((together, apart), outputs, strict=True):
                model.zero_grad()
                sum(y.pow(3).sum() for y in found[-2:]).backward()
                step(model)
                descend(model, 1e-4)
        for name, value in apart.state_dict().items():
            torch.testing.assert_close(value, together.state_dict()[name])
        assert held(apart) == held(together)
        assert apart.branches[0][1].num_batches_tracked == 4

    class Branches(nn.Module):
        """Two branches behind one stem; the forward says which."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4, window_size=4))
            self.branches = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, 4, 1), CBN(4, window_size=4)) for _ in range(2)
            )
            self.failure = None
            link(self)

        def forward(self, x, number):
            x = self.stem(x)
            if self.failure is not None:
                raise self.failure
            return self.branches[number](x).pow(3).mean()

        def counts(self):
            """How often each layer has learnt."""
            norms = self.stem[1], self.branches[0][1], self.branches[1][1]
            return [int(norm.num_batches_tracked) for norm in norms]

    def test_a_forward_that_fails_between_branches(self):
        """It leaves nothing: what the one before it left counts."""
        model, once = self.Branches(), self.Branches()
        for each in (model, once):
            each(images(0), 0).backward()
        model.failure = MemoryError()
        with pytest.raises(MemoryError):
            model(images(1), 1)
        step(model), step(once)
        assert_same(model, once)
        assert model.counts() == [1, 1, 0]

    def test_a_branch_counts_in_its_own_iteration_alone(self):
        model = self.Branches()
        for numbers in ((0, 1), (1,), (1, 1)):
            for number in numbers:
                model(images(number), number).backward()
            step(model)
        assert model.counts() == [3, 1, 3]

    @pytest.mark.parametrize("as_parts", [False, True])
    def test_an_empty_batch_comes_last(self, as_parts):
        """It reaches the layers, which have nothing to learn from it."""
        model = self.Branches()
        model(images(0), 0)
        model(images(1), 1)
        if as_parts:
            model.branches[0](torch.randn(0, 4, 3, 3))
        else:
            model(images(2)[:0], 0)
        step(model)
        assert model.counts() == [int(as_parts), 0, 1]

    def test_a_step_that_fails_counts_each_branch_once(self):
        class Broken:
            def scale(self, outputs):
                raise MemoryError

        model = self.Branches()
        for number in (0, 1):
            model(images(number), number).backward()
        with pytest.raises(MemoryError):
            step(model, Broken())
        step(model)
        assert model.counts() == [1, 1, 1]

    @pytest.mark.parametrize(
        "drop",
        [
            lambda model: model.branches[0].load_state_dict(model.branches[0].state_dict()),
            lambda model: model.branches[0][1].reset_running_stats(),
            lambda model: model.branches[0][1].set_window(2),
        ],
    )
    def test_what_is_dropped_before_the_step(self, drop):
        model = self.Branches()
        for number in (0, 1):
            model(images(number), number).backward()
        drop(model)
        step(model)
        assert model.counts() == [1, 0, 1]

    def test_branches_of_different_loss_scales(self):
        """Each branch's average of gradients takes out the scale of its own forward."""

        class Scaler:
            factor = 1.0

            def scale(self, outputs):
                return outputs * self.factor

        states = []
        for factors in ((1.0, 1.0), (64.0, 2.0)):
            model, scaler = self.Branches().double(), Scaler()
            step(model, scaler)
            for iteration in range(3):
                for number, scaler.factor in enumerate(factors):
                    loss = model(images(2 * iteration + number).double(), number)
                    scaler.scale(loss).backward()
                step(model, scaler)
            states.append([window["sums"] for (window,) in window_state(model).values()])
        torch.testing.assert_close(*states)

    def test_a_repetition_after_the_step_of_a_branch_is_refused(self):
        model = self.Branches()
        x = images().requires_grad_()
        loss = checkpoint(model, x, 0, use_reentrant=False)
        model(x, 1)
        step(model)
        model(x, 1)
        with pytest.raises(RuntimeError, match="repeats a forward whose iteration has ended"):
            loss.backward()

    def test_a_method_instead_of_the_model(self):
        """As the model itself, if it is called once in an iteration."""
        model = stages(5, call=lambda model, x: model.loss(x))
        assert_same(model, stages(5))

    def test_each_call_of_a_part_has_its_own_window(self):
        """If the linked model itself is not called, a repetition looks like one more call."""
        model = stages(0)
        for number in range(3):
            iterate(model, number, lambda model, x: model.loss(x) + model.loss(2 * x))
        assert held(model) == {"body.1": [3, 3], "head.1": [3, 3]}
        assert model.body[1].num_batches_tracked == 6
        first, second = window_state(model)["body.1"]
        assert not torch.allclose(first["recorded"], second["recorded"])

    @pytest.mark.filterwarnings("ignore:CBN. the weights changed since the last forward")
    def test_a_part_after_its_weights_moved_unseen(self):
        """A fused optimiser changes no version counter; a critic then runs once more."""
        outputs = []
        for is_seen in (True, False):
            model = stages(3, call=lambda model, x: model.loss(x) + model.loss(2 * x))
            model.body(images(7)).square().mean().backward()
            for parameter in model.body.parameters():
                moved = parameter.detach() - 0.5 * parameter.grad
                if is_seen:
                    with torch.no_grad():
                        parameter.copy_(moved)
                else:
                    parameter.data.copy_(moved)
            outputs.append(backward(model.body, images(8)))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)

    def test_parts_in_turn(self):
        """A loop that calls the parts is an iteration from step to step."""
        model = stages(4, call=lambda model, x: model.head(model.body(x)).square().mean())
        assert_same(model, stages(4))
        assert links(model) == {"body.1": "body.0", "head.1": "head.0"}

    def test_a_forward_drops_what_parts_left(self):
        model, other = stages(), stages()
        model.body(images(7))
        iterate(model, 8), iterate(other, 8)
        assert_same(model, other)

    def test_a_part_after_the_forward_is_one_more_call(self):
        model = stages(0)
        for number in range(2):
            iterate(model, number, lambda model, x: model(x) + model.body(x).mean())
        assert held(model) == {"body.1": [2, 2], "head.1": [2]}

    def test_a_step_without_a_forward_changes_nothing(self):
        model, other = stages(), stages()
        assert step(model) is None
        assert_same(model, other)

    def test_an_evaluation_between_forward_and_step(self):
        model, other = stages(), stages()

        def call(model, x):
            loss = model(x)
            model.eval()(images(9))
            model.train()
            return loss

        iterate(model, 8, call), iterate(other, 8)
        assert_same(model, other)

    @pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
    @pytest.mark.parametrize("is_stepped", [False, True])
    def test_an_interrupted_forward(self, kind, is_stepped):
        """The next forward begins anew; a failed one's traces are dropped if torch reports it."""
        model, other = stages(), stages()
        model.failure = kind("stop")
        with pytest.raises(kind):
            model(images(7))
        model.failure = None
        if is_stepped:
            step(model)
        else:
            iterate(model, 8), iterate(other, 8)
            assert_same(model, other)
        for number in (10, 11):
            model(images(number))
        step(model)
        is_told = kind is not KeyboardInterrupt
        body = 3 if is_stepped and is_told else 4
        assert held(model) == {"body.1": [body], "head.1": [3 + (not is_stepped)]}

    def test_a_model_that_calls_itself_stays_in_its_forward(self):
        class Again(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(4, 4, 1), CBN(4)

            def forward(self, x, again=2):
                if again:
                    x = self(x, again=again - 1)
                return self.norm(self.conv(x))

        model = Again()
        link(model)
        for number in range(3):
            model(images(9, 4))  # the step must ignore this forward
            train_once(model, images(number, 4))
        assert held(model) == {"norm": [3, 3, 3]}

    def test_models_in_threads_do_not_meet(self):
        expected, found = stages(30), []

        def train():
            model = copy.deepcopy(start)
            link(model)
            for number in range(30):
                iterate(model, number)
            found.append(model)

        start = Stages()
        threads = [threading.Thread(target=train) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for model in found:
            assert_same(model, expected)


class TestModelsWithinModels:
    def test_a_linked_part_of_a_linked_model(self):
        """The model was linked last: its forward is the iteration, the part's is not."""
        model, other = Stages(), stages(0)
        link(model.body)
        link(model)
        for number in range(4):
            iterate(model, number), iterate(other, number)
        assert_same(model, other)
        assert len(model.body._forward_pre_hooks) == 0

    def test_its_end_ends_the_iteration_of_the_whole(self):
        model, other = stages(), stages()
        model(images(7)), other(images(7))
        step(model.head), step(other)
        assert_same(model, other)

    def test_a_part_that_was_linked_last_has_iterations_of_its_own(self):
        """The last of the part's two forwards counts; the model's step ends both iterations."""
        model, other = stages(), stages()
        link(model.head)

        def call(model, x):
            model.head(torch.randn(2, 4, 3, 3))
            return model(x)

        for number in (7, 8):
            iterate(model, number, call), iterate(other, number)
        assert_same(model, other)
        model(images(9))
        step(model.head)
        assert held(model) == {"body.1": [4], "head.1": [5]}
        step(model)
        assert held(model) == {"body.1": [5], "head.1": [5]}

    def test_a_linked_part_does_not_end_the_forward(self):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), CBN(4))
        link(model[0])
        link(model)
        train_once(model, images())
        assert links(model) == {"1": "0.0"}

    @pytest.mark.parametrize("whole", [False, True])
    def test_linking_again_keeps_the_windows(self, whole):
        """Also where a wrapper around the model is linked in its place."""
        model, other = stages(3), stages(3)
        linked = nn.Sequential(model) if whole else model
        link(linked)
        assert held(linked) == {f"{'0.' * whole}{name}": [3] for name in ("body.1", "head.1")}
        for number in (7, 8):
            iterate(linked, number), iterate(other, number)
        assert_same(model, other)

    def test_linking_again_in_an_iteration_keeps_it(self):
        model, other = stages(), stages()
        iterate(model, 7, lambda model, x: (model(x), link(model))[0])
        iterate(other, 7)
        assert_same(model, other)

    def test_linking_again_in_an_iteration_drops_what_a_replaced_one_fed(self):
        model = stages()
        iterate(model, 3)
        before = held(model)
        model(images(4)).backward()
        model.body[0] = nn.Conv2d(3, 4, 3)
        link(model)
        step(model)
        assert held(model) == {**{name: [n + 1] for name, (n,) in before.items()}, "body.1": [0]}

    def test_linking_again_takes_in_what_is_new(self):
        model = stages()
        model.head.append(nn.Conv2d(4, 4, 1))
        model.head.append(CBN(4))
        assert link(model) == 3
        iterate(model, 7)
        assert links(model)["head.3"] == "head.2"
        assert held(model) == {"body.1": [3], "head.1": [3], "head.3": [1]}


class TestHowMuchRuns:
    """The package's own Python in a forward; for small maps it is most of the cost."""

    LAYERS, FOLDER = 20, str(Path(cbn_mmdet.norm.__file__).parent)

    @pytest.mark.parametrize(
        ("layer", "limit"),
        [({}, 35), (dict(window="sliding", window_size=4, backward="current"), 36)],
        ids=str,
    )
    def test_functions_of_a_forward(self, layer, limit):
        blocks = [
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), CBN(4, **layer))
            for _ in range(self.LAYERS)
        ]
        model = nn.Sequential(*blocks)
        link(model)
        for number in range(6):
            model(images(number, 4)).sum().backward()
            step(model)

        functions, everything, into_linking, depth = set(), 0, 0, 0

        def watch(frame, event, _):
            nonlocal everything, into_linking, depth
            code = frame.f_code
            if code is CBN.forward.__code__:
                depth += {"call": 1, "return": -1}.get(event, 0)
            if event != "call" or not code.co_filename.startswith(self.FOLDER):
                return
            everything += 1
            if depth > 0:
                functions.add(code)
                is_entry = code.co_filename != frame.f_back.f_code.co_filename
                into_linking += is_entry and code.co_filename.endswith("linking.py")

        x = images(9, 4)
        sys.setprofile(watch)
        try:
            model(x)
        finally:
            sys.setprofile(None)
        functions.discard(is_compiling.__code__)  # ours for torch 2.1 alone
        assert 10 < len(functions) <= limit
        assert into_linking == self.LAYERS
        # Includes the marks of the convolutions and the work for all layers at once.
        assert everything / self.LAYERS <= 74  # a sliding window; a moving one has fewer

    def test_attributes_that_a_layer_hides(self):
        hidden = {name for name in vars(CBN(4)) if name.startswith("_")}
        assert len(hidden - set(vars(nn.BatchNorm2d(4)))) <= 3


NORM = dict(type="CBN", window_size=3, derivative_stride=1)


def cascade_rcnn():
    """mmdet's Cascade R-CNN, much narrowed."""
    init_default_scope("mmdet")
    name = "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"
    cfg = Config.fromstring(f"_base_ = 'mmdet::{name}'", ".py").model
    cfg.backbone.update(depth=18, base_channels=4, init_cfg=None)
    cfg.neck.update(in_channels=[4, 8, 16, 32], out_channels=8)
    cfg.rpn_head.update(in_channels=8, feat_channels=8)
    cfg.roi_head.bbox_roi_extractor.out_channels = 8
    for head in cfg.roi_head.bbox_head:
        head.update(type="ConvFCBBoxHead", in_channels=8, conv_out_channels=4, norm_cfg=NORM)
        head.update(num_shared_convs=2, num_shared_fcs=1, fc_out_channels=16)
    return MODELS.build(cfg)


class TestSeveralForwards:
    """Each call of each norm in mmdet's heads, against a reference with that call's history."""

    def check(self, model, forward):
        torch.manual_seed(0)
        link(model)
        model.train()
        inputs, calls, references = {}, [], {}
        modules = dict(model.named_modules())
        names = {module: name for name, module in modules.items()}

        def note(norm, _, y):
            conv = modules[links(model)[names[norm]]]
            calls.append((norm, conv, inputs[conv].clone(), y.clone()))

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]}))
            elif isinstance(module, CBN):
                module.register_forward_hook(note)
        for _ in range(3):
            calls.clear()
            loss = forward(model)
            number = {}
            for norm, fed_by, x, y in calls:
                key = norm, number.setdefault(norm, 0)
                number[norm] += 1
                if key not in references:
                    conv = copy.deepcopy(fed_by).double()
                    references[key] = Reference(conv, norm.window, 3, norm.eps)
                slow, x = references[key], x.double()
                slow.conv.load_state_dict(fed_by.state_dict())
                expected = slow.forward(x, norm.weight, norm.bias)
                torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
                slow.step(x)
            model.zero_grad()
            loss.backward()
            step(model)
            descend(model, 0.1)
        return len(references)

    @pytest.mark.parametrize("kind", [RetinaHead, FCOSHead, RetinaSepBNHead])
    def test_dense_heads_on_five_levels(self, kind):
        init_default_scope("mmdet")
        separate = kind is RetinaSepBNHead
        head = kind(
            num_classes=3,
            in_channels=4,
            feat_channels=4,
            stacked_convs=2,
            norm_cfg=NORM,
            **(dict(num_ins=5) if separate else {}),
        )

        def forward(head):
            sizes = (17, 9, 5, 3, 2)
            levels = [torch.randn(2, 4, s, s) * (1 + i) + i for i, s in enumerate(sizes)]
            return sum(y.square().mean() for outputs in head(levels) for y in outputs)

        assert self.check(head, forward) == 5 * 2 * 2  # levels, convolutions, branches
        if separate:
            assert links(head)["cls_convs.3.1.bn"] == "cls_convs.0.1.conv"
        assert set(map(len, held(head).values())) == ({1} if separate else {5})

    @pytest.mark.slow
    def test_cascade_rcnn(self):
        model = cascade_rcnn()
        assert self.check(model, lambda model: total(loss_of(model))) == 3 * 2  # stages


# mmdet's own configs, each with the parts whose norm it leaves out.
STOCK = {
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": ["neck"],
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": [],
    "mask_rcnn/mask-rcnn_x101-32x4d_fpn_1x_coco.py": [],
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py": [],
    "gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py": [],
    "hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py": ["neck"],
    "regnet/faster-rcnn_regnetx-400MF_fpn_ms-3x_coco.py": [],
    "res2net/faster-rcnn_res2net-101_fpn_2x_coco.py": [],
    "pafpn/faster-rcnn_r50_pafpn_1x_coco.py": ["neck"],
    "nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py": [],
    "retinanet/retinanet_r50_fpn_1x_coco.py": ["bbox_head"],
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": [],
    "atss/atss_r50_fpn_1x_coco.py": [],
    "yolo/yolov3_d53_8xb8-320-273e_coco.py": [],
    "yolox/yolox_tiny_8xb8-300e_coco.py": [],
    "rtmdet/rtmdet_tiny_8xb32-300e_coco.py": [],
    "efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py": [],
}


class Handed:
    """What each CBN is handed and what each convolution returns, in one forward, as values."""

    def __init__(self, model):
        self.inputs, self.outputs, self.handles = {}, {}, []
        for name, module in model.named_modules():
            if isinstance(module, CBN):
                self.handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, name=name: self.inputs.update({name: args[0].clone()})
                    )
                )
            elif isinstance(module, nn.Conv2d):
                self.handles.append(
                    module.register_forward_hook(
                        lambda _, args, out, name=name: self.outputs.setdefault(name, []).append(
                            out.clone()
                        )
                    )
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_detectors(name):
    """Every CBN of an unmodified detector is fed by the convolution whose output it is handed."""
    torch.manual_seed(0)
    model = stock_model(name, STOCK[name]).train()
    layers = [name for name, module in model.named_modules() if isinstance(module, CBN)]
    assert link(model) == len(layers) > 0
    handed = Handed(model)
    loss_of(model)
    found = links(model)
    assert set(found) == set(handed.inputs), "each layer that ran is linked"
    assert len(found) > 0.7 * len(layers)
    for norm, conv in found.items():
        values = handed.inputs[norm]
        assert any(
            torch.equal(values, out) for out in handed.outputs[conv] if out.shape == values.shape
        )
    for handle in handed.handles:
        handle.remove()
    # The window fills, and the gradient through it reaches every convolution.
    step(model)
    losses = total(loss_of(model))
    assert losses.isfinite()
    losses.backward()
    assert all(module.window_bytes > 0 for n, module in model.named_modules() if n in found)
    convs = {n: module for n, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for conv in set(found.values()):
        assert convs[conv].weight.grad is not None
