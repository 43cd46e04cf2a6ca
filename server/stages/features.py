"""Features: private class features from the sites, and the teacher that is made of them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from common.features import View, directions_of, features_of
from common.protocol import Arrays, FeaturesReply, FeaturesRequest
from server.session import Session
from server.synthesis.public_set import public_images
from server.synthesis.teacher import Teacher, view_of


def features(session: Session) -> Teacher | None:
    """The teacher that the sites' features make; None where the study plans none.

    Directions and answers are kept: a run that was stopped asks the very same question, and only once.

    Raises:
        FederationError: fewer usable answers than federation.min_sites.
        DataError: the public set cannot be read.
    """
    study, plan = session.agreement.study, session.agreement.plan.get("features")
    if plan is None:
        return None
    folder = session.folder

    def asked() -> Arrays:
        arrays = folder.made_once("directions", lambda: _directions(session))
        return {**_ask(session, View.read(study, arrays)), **arrays}

    sums = folder.made_once("features", asked)  # with the directions that they are along
    view = View.read(study, {name: sums[name] for name in ("centre", "directions")})
    return Teacher.fit(
        features_of(study), view, sums["means"], sums["second_moments"], sums["counts"],
        noise_std=float(sums["noise_std"][0]),
    )  # fmt: skip


def _directions(session: Session) -> Arrays:
    study = session.agreement.study
    session.progress.stage("features", "looking for directions in public images")
    public = public_images(study).images
    return view_of(public, features_of(study), many=directions_of(study), seed=study.study.seed).arrays()


def _ask(session: Session, view: View) -> Arrays:
    study, many = session.agreement.study, directions_of(session.agreement.study)
    shapes = {"means": (len(study.data.classes), many), "second_moments": (many * (many + 1) // 2,)}
    request = FeaturesRequest(agreement=session.agreement)
    return session.ask_sums("features", dict.fromkeys(session.members, (request, view.arrays())), FeaturesReply, shapes)
