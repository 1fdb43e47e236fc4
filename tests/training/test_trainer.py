"""The trainer: bit-identical after a kill, the same with one process or two, and clear when it cannot go on."""

import dataclasses
import itertools
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

import hierens
from hierens.core.labels import label_names
from hierens.training.checkpoints.files import MANIFEST, seal
from hierens.training.checkpoints.selection import choose_checkpoint, newest_checkpoint
from hierens.training.config import TeacherConfig
from hierens.training.divergence import TrainingDivergedError
from support.runs import log, made_up_data, trainer, weights


@pytest.mark.sampled
def test_workers_do_not_change_the_result(launcher, short_run, tmp_path):
    settings, undisturbed = short_run
    launcher.start(tmp_path, settings | {"workers": 2}).finish()
    assert weights(tmp_path) == weights(undisturbed)


def test_it_learns_and_saves_what_it_validated(tmp_path):
    run = trainer(tmp_path, epochs=8, lr=0.05)
    history = run.fit()
    assert [record["epoch"] for record in history] == list(range(1, 9))
    assert all(accuracy > 90 for accuracy in history[-1]["accuracy"])
    model = hierens.from_pretrained(tmp_path / "model")
    assert label_names(model) is None, "nobody named the classes"
    images, targets = made_up_data(40, 1).tensors
    for depth, accuracy in enumerate(history[-1]["accuracy"]):
        right = (model(images, depth=depth).argmax(-1) == targets).float().mean()
        assert 100 * right == pytest.approx(accuracy)
    card = (tmp_path / "model" / "README.md").read_text()
    assert re.search(rf"\| +2 \| .* {history[-1]['accuracy'][2]:.2f} \|", card), "a row per depth, with its accuracy"


def test_finished_runs_stay_finished(tmp_path):
    trainer(tmp_path).fit()
    before = weights(tmp_path)
    again = trainer(tmp_path)
    assert again.fit() and again.state.step == 6
    assert weights(tmp_path) == before
    assert trainer(tmp_path, resume="never", seed=3).fit() and weights(tmp_path) != before


def test_negative_and_large_seeds_are_seeds_like_others(tmp_path):
    """As `hash` has it, -1 is -2 and 2^61 - 1 is 0."""
    found = {}
    for seed in (-1, -2, 0, 2**61 - 1):
        run = trainer(tmp_path / str(seed), epochs=1, mixup=0.5, symmetry_noise=0, seed=seed)
        run.fit()
        found[seed] = run.ensemble.state_dict()["classifier.0.fc.weight"]
    assert not any(torch.equal(found[a], found[b]) for a, b in itertools.combinations(found, 2))


@pytest.mark.sampled
def test_the_average_of_the_weights_is_evaluated_saved_and_resumed(tmp_path):
    full = trainer(tmp_path / "full", ema_decay=0.9)
    history = full.fit()
    assert len(history[-1]["ema_accuracy"]) == 3
    average = hierens.from_pretrained(tmp_path / "full" / "model_ema").state_dict()
    raw = full.ensemble.state_dict()
    name = "classifier.0.fc.weight"
    assert torch.equal(average[name], full.ema.module.state_dict()[name])
    assert not torch.allclose(average[name], raw[name])
    first = trainer(tmp_path / "parts", ema_decay=0.9)
    first.config = dataclasses.replace(first.config, epochs=1)  # stops after an epoch, the schedule being for two
    first.fit()
    trainer(tmp_path / "parts", ema_decay=0.9).fit()
    resumed = hierens.from_pretrained(tmp_path / "parts" / "model_ema").state_dict()
    assert all(torch.equal(resumed[key], average[key]) for key in average)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """In evaluation mode batch norm sees no batch, so two micro-batches must give one large step exactly."""
    updated = []
    for accumulation in (1, 2):
        run = trainer(tmp_path / str(accumulation), epochs=1, accumulation=accumulation, data=made_up_data(32), seed=1)
        for module in run.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True: None  # stays so when the trainer sets the mode
        run.fit()
        assert run.state.step == 1
        updated.append(run.ensemble.state_dict())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(u.values() for u in updated), strict=True))


def test_checkpoints_are_kept_by_number(tmp_path):
    history = trainer(tmp_path, epochs=3, checkpoint_steps=1, keep_checkpoints=2).fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    best = max(history, key=lambda record: record["accuracy"][-1])["step"]
    assert names == ["best", *(f"step-{step:09d}" for step in sorted({best, 8, 9}))]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    trainer(tmp_path).fit()
    good = newest_checkpoint(tmp_path)
    for name in ("step-000000999.partial", "step-000000998"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-000000999.partial" / "trainer.json").write_text("{}")
    assert choose_checkpoint(tmp_path, "auto") == good


def test_the_trainer_breaks_the_symmetry_of_copies(tmp_path):
    copied = trainer(tmp_path / "a", init="copy")
    assert not copied.ensemble.symmetric
    assert trainer(tmp_path / "b", init="copy", symmetry_noise=0.0).ensemble.symmetric


def test_clipping_precision_and_checkpointing_run(tmp_path):
    run = trainer(tmp_path, clip_grad=0.5, precision="bf16", warmup_epochs=1, optimizer="adamw", lr=1e-3)
    run.ensemble.set_grad_checkpointing()
    assert run.fit()[-1]["val_loss"] < 1.0


@pytest.mark.parametrize("epochs", [None, 1])
def test_frozen_levels_stay_until_they_are_released(tmp_path, epochs):
    run = trainer(tmp_path, epochs=2, freeze_levels=2, unfreeze_epoch=epochs, weight_decay=0.1, init="copy")
    seen = []
    validate = run._validate

    def look(epoch):
        validate(epoch)
        seen.append({name: tensor.clone() for name, tensor in run.ensemble.state_dict().items()})

    run._validate = look
    start = {name: tensor.clone() for name, tensor in run.ensemble.state_dict().items()}
    run.fit()
    frozen = [name for name in start if name.startswith(("levels.0.", "levels.1."))]
    moved = [[name for name in start if not torch.equal(start[name], state[name])] for state in seen]
    assert not set(moved[0]) & set(frozen), "weights and running statistics stay as they were"
    assert any(name.startswith("levels.2.") for name in moved[0])
    assert bool(set(moved[1]) & set(frozen)) == (epochs is not None)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_gradients_are_clipped_as_asked(tmp_path, mode):
    run = trainer(
        tmp_path, epochs=1, clip_grad=1e-3, clip_mode=mode, optimizer="momentum", lr=1.0, momentum=0.0, weight_decay=0
    )
    before = {name: p.detach().clone() for name, p in run.ensemble.named_parameters()}
    images, targets = next(iter(run.train_loader))
    run._micro_step(images, targets, 0, [])
    steps = {name: (p.detach() - before[name]) for name, p in run.ensemble.named_parameters()}
    if mode == "norm":
        assert torch.cat([s.flatten() for s in steps.values()]).norm() == pytest.approx(1e-3, rel=1e-2)
    elif mode == "value":
        assert max(s.abs().max() for s in steps.values()) == pytest.approx(1e-3, rel=1e-2)
    else:
        name = "classifier.0.fc.weight"
        units = steps[name].flatten(1).norm(dim=1) / before[name].flatten(1).norm(dim=1)
        assert 0 < units.max() <= 1.01e-3


def test_layer_decay_slows_the_first_levels(tmp_path):
    run = trainer(tmp_path, layer_decay=0.5, optimizer="adamw", optimizer_args={"betas": [0.8, 0.9]})
    names = {id(p): name for name, p in run.ensemble.named_parameters()}
    scales = {
        re.match(r"(levels\.\d|\w+)", names[id(p)])[0]: g["lr_scale"]
        for g in run.optimizer.param_groups
        for p in g["params"]
    }
    assert scales["levels.0"] < scales["levels.1"] < scales["levels.2"] < scales["classifier"] == 1
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in run.optimizer.param_groups)


@pytest.mark.sampled
def test_everything_together_resumes_in_the_same_bits(tmp_path):
    """Mixup, cutmix, teachers, gradient equilibrium and schedules that move: stopped after an epoch and resumed."""
    settings = {
        "mixup": 0.3,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "ema_decay": 0.9,
        "ema_teacher": True,
        "gradient_equilibrium": True,
        "alpha_warmup_epochs": 2,
        "final_temperature": 1.0,
        "schedule": "plateau",
        "grad_checkpointing": True,
        "optimizer": "adamw",
        "epochs": 3,
        "teacher_config": TeacherConfig("x", teacher_share=0.3),
    }

    def teacher():
        torch.manual_seed(5)
        return timm.create_model("resnet8_cifar", channels=(4, 4, 4), num_classes=2, in_chans=1)

    full = trainer(tmp_path / "full", teacher=teacher(), **settings)
    full.fit()
    first = trainer(tmp_path / "parts", teacher=teacher(), **settings)
    first.config = dataclasses.replace(first.config, epochs=1)  # stops after an epoch, the schedules being for three
    first.fit()
    resumed = trainer(tmp_path / "parts", teacher=teacher(), **settings)
    resumed.fit()
    assert resumed.state.step == full.state.step == 9
    assert weights(tmp_path / "parts") == weights(tmp_path / "full")


@pytest.mark.slow
def test_compiled_steps_train_as_eager_ones(tmp_path):
    losses = []
    for compiled in (False, True):
        run = trainer(tmp_path / str(compiled), epochs=1, compile=compiled)
        run.fit()
        losses.append([record["loss"] for record in log(tmp_path / str(compiled)) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_diverging_run_says_when_and_keeps_the_last_good_checkpoint(tmp_path):
    class Poisoned(TensorDataset):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return (image * float("nan") if poisoned else image), target

    poisoned = False
    run = trainer(tmp_path, epochs=3, data=Poisoned(*made_up_data().tensors))
    validate = run._validate

    def poison_the_second_epoch(epoch):
        nonlocal poisoned
        validate(epoch)
        poisoned = True

    run._validate = poison_the_second_epoch
    with pytest.raises(TrainingDivergedError, match=r"the loss is nan at step 4; .*step-000000003"):
        run.fit()
    assert newest_checkpoint(tmp_path).name == "step-000000003"
    resumed = trainer(tmp_path, epochs=3)
    resumed.fit()
    assert resumed.state.step == 9


def test_weights_that_overflow_are_not_checkpointed(tmp_path):
    run = trainer(tmp_path, epochs=1)
    with torch.no_grad():
        run.ensemble.get_classifier()[0].bias.fill_(float("inf"))
    with pytest.raises(TrainingDivergedError, match="there is no checkpoint from before"):
        run.fit()
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("averaged", [False, True])
def test_statistics_that_overflow_are_not_checkpointed(tmp_path, averaged):
    """Training does not use the running statistics, so the loss stays finite."""
    run = trainer(tmp_path, epochs=1, ema_decay=0.9 if averaged else None)
    spoilt = run.ema.module if averaged else run.ensemble
    name, statistics = next((n, b) for n, b in spoilt.named_buffers() if n.endswith("running_var"))
    statistics.fill_(float("inf"))
    named = f"{'the average of ' if averaged else ''}{name} is not finite after step 3"
    with pytest.raises(TrainingDivergedError, match=f"{named}; there is no checkpoint from before"):
        run.fit()
    assert newest_checkpoint(tmp_path) is None


def test_the_last_good_checkpoint_has_finite_values_and_a_finite_validation(tmp_path):
    """Not one whose validation was not finite, nor one with statistics that are not, as older versions wrote."""
    run = trainer(tmp_path, epochs=5, keep_checkpoints=9)
    validate = run._validate

    def go_wrong_slowly(epoch):
        validate(epoch)
        if epoch == 1:
            run.state.history[-1]["val_loss"] = float("nan")
        if epoch == 3:
            spoil(newest_checkpoint(tmp_path), "running_mean")
            next(run.ensemble.buffers()).fill_(float("nan"))

    run._validate = go_wrong_slowly
    with pytest.raises(
        TrainingDivergedError, match=r"running_mean is not finite after step 12; .*step-000000003\. Try"
    ):
        run.fit()


def spoil(checkpoint, name):
    """Put a value that is not finite into a checkpoint, and seal it again."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    next(tensor for key, tensor in tensors.items() if key.endswith(name)).view(-1)[0] = float("nan")
    save_file(tensors, file)
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)


def test_no_run_goes_on_from_values_that_are_not_finite(tmp_path, capsys):
    trainer(tmp_path, checkpoint_steps=2).fit()
    newest = newest_checkpoint(tmp_path)
    spoil(newest, "running_var")
    with pytest.raises(
        ValueError, match=r"step-000000006 is damaged: .*running_var in model.safetensors is not finite"
    ):
        trainer(tmp_path, resume=str(newest)).fit()
    trainer(tmp_path, checkpoint_steps=2).fit()
    assert "running_var in model.safetensors is not finite. It was renamed to step-000000006.damaged" in (
        shown := capsys.readouterr().out
    )
    assert re.search(r"resuming from .*step-00000000[45]", shown)


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path):
    run = trainer(tmp_path, epochs=3, keep_checkpoints=1)
    validate = run._validate

    def be_best_for_no_reason(epoch):
        validate(epoch)
        run.state.history[-1]["accuracy"][-1] = (50.0, 100.0, 40.0)[epoch]
        if epoch == 1:
            run.state.history[-1]["val_loss"] = float("nan")

    run._validate = be_best_for_no_reason
    run.fit()
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-000000003"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "nonsense"}, "unknown objective 'nonsense'"),
        ({"optimizer": "nonsense"}, "optimiser 'nonsense'"),
        ({"schedule": "nonsense"}, "unknown schedule 'nonsense'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"accumulation": 3}, "32 is not divisible by 3"),
        ({"resume": "/nowhere"}, "/nowhere is no checkpoint"),
        ({"freeze_levels": 4}, "freeze_levels is 4, but the model has 3 levels"),
        ({"optimizer_args": {"nonsense": 1}}, "optimiser 'sgd'.*nonsense"),
        ({"schedule_args": {"nonsense": 1}}, "schedule 'cosine'.*nonsense"),
        ({"mixup": -1.0}, "mixup must not be negative"),
    ],
)
def test_bad_settings_are_refused_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings).fit()
    assert not (tmp_path / "checkpoints").exists()
