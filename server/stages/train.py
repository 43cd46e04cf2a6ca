"""Train: rounds of private training at the sites, averaged, checked and checkpointed.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from common.errors import ReplyError
from common.loss_curve import mean_loss
from common.model.diffusion_model import initial_weights, load_model
from common.model.weights import LARGEST_WEIGHT
from common.optimizer import Adam, largest_update_norm
from common.protocol import Arrays, TrainReply, TrainRequest
from server.checkpoints import Checkpoint, RoundRow
from server.federation.aggregation import average, mean_gradient, moved, moving_average, within
from server.federation.collect import Collected
from server.federation.screening import largest_sum_norm, most_drawn, most_units, screen_arrays, screen_norm
from server.session import Session


def train(session: Session) -> Checkpoint:
    """Run the rounds that are left, from the newest checkpoint.

    A site whose budget is used up stops by itself; when too few are left because of that, training ends early with
    what it has, and the run goes on.

    Raises:
        FederationError: too few usable answers for another reason; the last checkpoint stands.
    """
    study = session.agreement.study
    rounds = study.training.rounds
    kept = session.folder.last_checkpoint()
    state = kept
    if state is None:
        weights = initial_weights(study)
        state = Checkpoint(0, weights, {name: array.copy() for name, array in weights.items()})
    ended = session.folder.result("train") is not None  # early or not: images may have been drawn of it
    if rounds == 0 or ended:
        return state
    text = f"round {state.round + 1} of {rounds}" if kept else f"{rounds} rounds"
    session.progress.stage("train", text, done=state.round)
    while state.round < rounds:
        following = _one_round(session, state)
        if following is None:
            break
        session.folder.save_checkpoint(following)
        state = following
    session.folder.keep_result("train", {"rounds": state.round})
    return state


def _one_round(session: Session, state: Checkpoint) -> Checkpoint | None:
    """One round, or None when the sites' budgets are used up."""
    study, number, began = session.agreement.study, state.round + 1, time.monotonic()
    batches = {node: study.training.sample_rate * member.weight for node, member in session.members.items()}
    requests = {
        node: (TrainRequest(agreement=session.agreement, round=number, expected_batch=batch), state.weights)
        for node, batch in batches.items()
    }
    door = _Door(session, state.weights, number)
    collected = session.ask(f"round {number}", requests, TrainReply, door.screen, may_run_out=True)
    if len(collected.accepted) < study.federation.min_sites:
        used = len(collected.exhausted)
        session.progress.warn(f"training ends after round {state.round}: the budget of {used} sites is used")
        return None
    losses = _losses(session, collected, batches)
    weights, optimizer = _stepped(session, state, collected, batches)
    steps = study.training.local_steps
    row = RoundRow(
        round=number, loss=losses,
        epsilon={member.name: round(member.spent.train, 4) for member in session.members.values()},
        accepted=sorted(collected.arrays), rejected=collected.reasons, seconds=round(time.monotonic() - began, 2),
    )  # fmt: skip
    ema = moving_average(state.ema, weights, decay=study.training.ema_decay, steps=steps, step=number * steps)
    _tell(session, row, draws=sum(batches[a.node] for a in collected.accepted) * steps)
    return Checkpoint(number, weights, ema, [*state.rows, row], optimizer)


def _losses(session: Session, collected: Collected, batches: dict[int, float]) -> float:
    """Noisy mean loss over the records of the sites that answered; takes the losses out of their arrays."""
    plan, total, loss = session.agreement.plan["train"], 0.0, 0.0
    for answer in collected.accepted:
        batch = batches[answer.node]
        noisy_sum = float(answer.arrays.pop("loss")[0])
        own = mean_loss(noisy_sum, max_grad_norm=plan.sensitivity, expected_batch=batch, steps=plan.steps)
        total, loss = total + batch, loss + own * batch
    return loss / total


def _stepped(
    session: Session, state: Checkpoint, collected: Collected, batches: dict[int, float]
) -> tuple[Arrays, Arrays]:
    """(weights, optimizer's state) after the round; post-processing. No weight leaves what a site takes on arrival."""
    training = session.agreement.study.training
    expected = {answer.site.name: batches[answer.node] for answer in collected.accepted}
    if training.algorithm == "fedsgd":
        gradient = mean_gradient(collected.arrays, expected)
        changed, optimizer = _adam_step(state, gradient, learning_rate=training.learning_rate)
    else:
        changed, optimizer = moved(state.weights, average(collected.arrays, expected)), {}
    return {**state.weights, **within(changed, LARGEST_WEIGHT)}, optimizer


def _adam_step(state: Checkpoint, gradient: Arrays, *, learning_rate: float) -> tuple[Arrays, Arrays]:
    """(changed weights, optimizer's state) after one step of Adam on the sites' common gradient."""
    changed = {name: torch.from_numpy(state.weights[name].copy()) for name in gradient}
    adam = Adam(changed, learning_rate=learning_rate)
    if state.optimizer:
        adam.load(state.optimizer)
    adam.step({name: torch.from_numpy(part) for name, part in gradient.items()})
    return {name: tensor.numpy() for name, tensor in changed.items()}, adam.state()


@dataclass(frozen=True)
class _Bounds:
    """L2 bounds of an honest site's answer."""

    update: float
    loss: float


class _Door:
    """Screens the answers of one round."""

    def __init__(self, session: Session, weights: Arrays, number: int) -> None:
        self._session, self._number = session, number
        trained = load_model(session.agreement.study, weights).set_trainable(
            session.agreement.study.training.parameters
        )
        self._shapes = {name: weights[name].shape for name in trained}
        self._parameters = sum(weights[name].size for name in trained)

    def screen(self, node: int, body: TrainReply, arrays: Arrays) -> None:
        """Check one answer.

        Raises:
            ReplyError: what is wrong with it.
        """
        if body.round != self._number:
            raise ReplyError(f"an answer to another question (round {body.round})", where="reply")
        screen_arrays(arrays, expected={**self._shapes, "loss": (1,)}, dtype="float32")
        bounds = self._bounds(node)
        update = {name: array for name, array in arrays.items() if name != "loss"}
        screen_norm(update, largest=bounds.update, what="update")
        screen_norm({"loss": arrays["loss"]}, largest=bounds.loss, what="loss")

    def _bounds(self, node: int) -> _Bounds:
        """What the optimizer can move, or what records and noise can add up to."""
        plan, study = self._session.agreement.plan, self._session.agreement.study
        train, counts = plan["train"], self._session.members[node].counts
        drawn = most_drawn(most_units(counts, plan["counts"].noise_std), train.sample_rate)

        def sums(steps: int, numbers: int) -> float:
            return largest_sum_norm(
                units=drawn * steps, sensitivity=train.sensitivity, noise_std=train.noise_std * math.sqrt(steps),
                numbers=numbers,
            )  # fmt: skip

        if study.training.algorithm == "fedsgd":
            update = sums(1, self._parameters)
        else:
            rate = study.training.learning_rate
            update = largest_update_norm(parameters=self._parameters, steps=train.steps, learning_rate=rate)
        return _Bounds(min(update, study.training.max_update_norm or math.inf), sums(train.steps, 1))


def _tell(session: Session, row: RoundRow, *, draws: float) -> None:
    study = session.agreement.study
    pace = draws * study.diffusion.noise_multiplicity / max(row.seconds, 1e-3)
    spent = " ".join(f"{site} {epsilon:.2f}" for site, epsilon in row.epsilon.items())
    session.progress.step(
        "train", row.round, study.training.rounds,
        f"loss {row.loss:.3f} (noisy)  epsilon {spent}  {pace:.0f} images/s",
        round=row.round, loss=row.loss, epsilon=row.epsilon, seconds=row.seconds, images_per_second=round(pace, 1),
        accepted=row.accepted, rejected=row.rejected,
    )  # fmt: skip
