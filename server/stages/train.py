"""Train: rounds of private training at the sites, averaged, checked and checkpointed.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import time

import torch

from common.accounting import MechanismPlan
from common.errors import ReplyError
from common.messages import Arrays, TrainReply, TrainRequest
from common.model.diffusion_model import initial_weights, load_model
from common.optimizer import Adam, largest_update_norm
from common.study import Study
from server.checkpoints import Checkpoint, RoundRow
from server.federation.aggregation import apply, average, mean_gradient, moving_average
from server.federation.screening import largest_sum_norm, screen_update
from server.federation.sites import Answers
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
    if rounds == 0:
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
    requests = {
        node: TrainRequest(
            agreement=session.agreement, round=number, arrays=state.weights,
            expected_batch=study.training.sample_rate * member.weight,
        )
        for node, member in session.members.items()
    }  # fmt: skip
    answers = session.group.ask(requests)
    batches = {session.members[node].site: request.expected_batch for node, request in requests.items()}
    updates, losses, reasons = _screen(session, answers, state.weights, number, batches)
    for site, reason in reasons.items():
        session.progress.warn(f"round {number}: {site} left out: {reason}", site=site, round=number)
    exhausted = [r for r in answers.refusals.values() if r.kind == "BudgetError"]
    if len(updates) < study.federation.min_sites and exhausted:
        session.progress.warn(f"training ends after round {state.round}: the budget of {len(exhausted)} sites is used")
        return None
    session.require(len(updates), reasons, "train")
    weights_by_site = {member.site: member.weight for member in session.members.values()}
    total = sum(weights_by_site[site] for site in updates)
    if study.training.step == "summed":
        weights, optimizer = _summed_step(
            session,
            state,
            mean_gradient(updates, batches),
            noise_std=_noise_std(session, [batches[s] for s in updates]),
        )
    else:
        weights, optimizer = apply(state.weights, average(updates, weights_by_site)), {}
    steps = study.training.local_steps
    row = RoundRow(
        round=number,
        loss=sum(losses[site] * weights_by_site[site] for site in losses) / total,
        epsilon={m.site: round(m.spent.train, 4) for m in session.members.values()},
        accepted=sorted(updates), rejected=reasons, seconds=round(time.monotonic() - began, 2),
    )  # fmt: skip
    ema = moving_average(state.ema, weights, decay=study.training.ema_decay, steps=steps, step=number * steps)
    draws = total * study.training.sample_rate * steps * study.diffusion.noise_multiplicity
    session.progress.step(
        "train", number, study.training.rounds,
        f"loss {row.loss:.3f} (noisy)  epsilon "
        + " ".join(f"{site} {spent:.2f}" for site, spent in row.epsilon.items())
        + f"  {draws / max(row.seconds, 1e-3):.0f} images/s",
        round=number, loss=row.loss, epsilon=row.epsilon, seconds=row.seconds,
        images_per_second=round(draws / max(row.seconds, 1e-3), 1), accepted=row.accepted, rejected=row.rejected,
    )  # fmt: skip
    return Checkpoint(number, weights, ema, [*state.rows, row], optimizer)


def _noise_std(session: Session, batches: list[float]) -> float:
    """Standard deviation of the noise in each number of the sites' common gradient."""
    plan = session.agreement.plan.train
    assert plan is not None
    return plan.noise_multiplier * plan.sensitivity * math.sqrt(len(batches)) / sum(batches)


def _summed_step(session: Session, state: Checkpoint, gradient: Arrays, *, noise_std: float) -> tuple[Arrays, Arrays]:
    """(weights, optimizer's state) after one step of Adam on the sites' common gradient; post-processing."""
    training = session.agreement.study.training
    trained = {name: torch.from_numpy(state.weights[name].copy()) for name in gradient}
    adam = Adam(
        trained, learning_rate=training.learning_rate,
        noise_std=noise_std if training.second_moment == "corrected" else 0.0,
    )  # fmt: skip
    if state.optimizer:
        adam.load(state.optimizer)
    adam.step({name: torch.from_numpy(part) for name, part in gradient.items()})
    return {**state.weights, **{name: tensor.numpy() for name, tensor in trained.items()}}, adam.state()


def _largest_norm(study: Study, plan: MechanismPlan, parameters: int, expected_batch: float) -> float:
    """L2 bound of an honest answer: what the optimizer can move, or what records and noise can add up to."""
    if study.training.max_update_norm is not None:
        return study.training.max_update_norm
    if study.training.step == "summed":
        return largest_sum_norm(
            records=expected_batch, max_grad_norm=plan.sensitivity,
            noise_std=plan.noise_multiplier * plan.sensitivity, numbers=parameters,
        )  # fmt: skip
    return largest_update_norm(parameters=parameters, steps=plan.steps, learning_rate=study.training.learning_rate)


def _screen(
    session: Session, answers: Answers, weights: Arrays, number: int, batches: dict[str, float]
) -> tuple[dict[str, Arrays], dict[str, float], dict[str, str]]:
    """(updates by site, losses by site, reasons by left-out site)."""
    study, plan = session.agreement.study, session.agreement.plan.train
    assert plan is not None
    trained = load_model(study, weights).train_only(study.training.parameters)
    shapes = {name: weights[name].shape for name in trained}
    parameters = sum(weights[name].size for name in trained)
    updates: dict[str, Arrays] = {}
    losses: dict[str, float] = {}
    reasons = session.excuses(answers)
    for node, reply in sorted(answers.replies.items()):
        member = session.members[node]
        try:
            if not isinstance(reply, TrainReply) or reply.site != member.site or reply.round != number:
                raise ReplyError("an answer to another question", where="reply")
            bound = _largest_norm(study, plan, parameters, batches[member.site])
            screen_update(reply.arrays, expected=shapes, largest_norm=bound, loss=reply.loss)
        except ReplyError as error:
            reasons[member.site] = error.what
            member.open_question = True
            continue
        member.note(reply.spent)
        updates[member.site], losses[member.site] = reply.arrays, reply.loss
    return updates, losses, reasons
