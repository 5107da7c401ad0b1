"""`evaluate`: a router and its rivals on the prompts that it was not trained on, as JSON and an HTML report."""

# N prompts, T targets

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_jobs import cluster
from prefill_jobs.embed import Embeddings, embed, load_embeddings
from prefill_jobs.graded import GradedStore
from prefill_jobs.predict import GradedPrediction, predict_graded
from prefill_jobs.probe import load_probes
from prefill_router import report, storage
from prefill_router.about import versions
from prefill_router.baselines import knn_p_correct
from prefill_router.baselines.fitting import Fitted, Prompts, fit_all
from prefill_router.baselines.router import BaselineRouter
from prefill_router.config import EvaluateConfig
from prefill_router.console import say
from prefill_router.evaluation import Contender, Evaluation, HeldOut, oracle
from prefill_router.evaluation import evaluate as score
from prefill_router.router import Router
from prefill_router.split import Part

Array = NDArray[Any]


def evaluate(config: EvaluateConfig, notice: str | None = None) -> Evaluation:
    """Writes report.json and report.html to `config.out`; `notice` stands on top of the page.

    The prompts that training saw are left out, and are what baselines are fitted on.
    """
    router = Router.load(config.router)
    graded = GradedStore.open(config.activations, config.outcomes, router.pool, ignore_unknown=config.ignore_unknown)
    router.check_encoder(graded.store.manifest.encoder.fingerprint, config.activations)
    probes = None if config.probe is None else load_probes(config.probe)
    cluster.connect()
    predicted = predict_graded(router, graded, with_features=True)
    trial = _Trial(router, predicted, _embeddings(config))
    rivals = list(trial.rivals(config.keep_baselines))
    result = score(
        router.pool,
        router.version,
        trial.held_out,
        trial.contender("router", "prefill router", predicted.prediction.p_correct, router.default_tolerance),
        rivals,
        p_uncalibrated=predicted.p_uncalibrated[trial.is_held_out],
        num_seen=int((~trial.is_held_out).sum()),
        num_draws=config.draws,
        about=_about(config, router, graded),
    )
    storage.write_json(storage.join(config.out, "report.json"), result.to_json())
    page = report.render_html(result, probes, notice)
    storage.write_bytes(storage.join(config.out, "report.html"), page.encode())
    return result


def _embeddings(config: EvaluateConfig) -> Embeddings | None:
    """Those that lie at `embeddings`, made first where a corpus is given."""
    kept = config.embeddings or storage.join(config.out, "embeddings")
    if config.corpus is not None:
        return embed(config.corpus, config.sentence_encoder, kept)
    return None if config.embeddings is None else load_embeddings(kept)


@dataclass(frozen=True)
class _Trial:
    """The graded prompts of a store: those that the router was trained on, and those that it is judged on."""

    router: Router
    predicted: GradedPrediction
    embeddings: Embeddings | None

    @property
    def is_held_out(self) -> NDArray[np.bool_]:
        return ~np.isin(self.predicted.keys, self.router.training_prompts)

    @property
    def held_out(self) -> HeldOut:
        rows, of = self.is_held_out, self.predicted
        return HeldOut(of.num_tokens[rows], of.correct[rows], of.output_tokens[rows])

    def contender(self, name: str, title: str, p_correct: Array, tolerance: float) -> Contender:
        """One that reads activations, as the router does: of all prompts, those that are held out."""
        rows, expected = self.is_held_out, self.predicted.prediction.expected_output_tokens
        return Contender(name, title, p_correct[rows], expected[rows], tolerance)

    def rivals(self, keep: str | None) -> Iterator[Contender]:
        """Every baseline that the data allow; those that can be served are written to `keep`."""
        prompts, held = self._prompts(), self.is_held_out
        parts = np.where(held, Part.TEST, self.router.split.parts(self.predicted.keys))
        training, validation = (prompts[~held & (parts == part)] for part in (Part.TRAIN, Part.VALIDATION))
        if not len(training):
            say("evaluate: none of the store's prompts was trained on: baselines have nothing to be fitted on")
        else:
            for fitted in fit_all(self.router.pool, training, validation):
                yield self._rival(fitted, prompts[held])
                if keep is not None and self.embeddings is not None:
                    self._served(fitted, self.embeddings).save(storage.join(keep, fitted.title.replace(" ", "-")))
            if self.predicted.features is not None:
                yield self._neighbours_of_activations(self.predicted.features, ~held & (parts == Part.TRAIN))
        yield oracle(self.held_out, self.predicted.prediction.expected_output_tokens[held])

    def _prompts(self) -> Prompts:
        of = self.predicted
        if self.embeddings is None:
            return Prompts(of.num_tokens, of.correct, of.output_tokens, of.num_tokens, None)
        is_known, vectors, lengths = self.embeddings.at(of.keys)
        if not is_known.all():
            say(f"evaluate: {int((~is_known).sum()):,} prompts have no embedding: to semantic baselines they are blank")
        return Prompts(of.num_tokens, of.correct, of.output_tokens, lengths, vectors)

    def _rival(self, fitted: Fitted, held_out: Prompts) -> Contender:
        p = fitted.p_correct(held_out)
        expected = np.broadcast_to(fitted.output_tokens, p.shape)
        name = fitted.title if fitted.name == "always" else fitted.name
        return Contender(name, fitted.title, p, expected, fitted.tolerance)

    def _neighbours_of_activations(self, features: NDArray[np.float32], is_training: NDArray[np.bool_]) -> Contender:
        p = knn_p_correct(features, features[is_training], self.predicted.correct[is_training])
        return self.contender("knn_activations", "k nearest neighbours by activations", p, 0.0)

    def _served(self, fitted: Fitted, embeddings: Embeddings) -> BaselineRouter:
        return BaselineRouter(
            name=fitted.name,
            baseline=fitted.baseline,
            pool=self.router.pool,
            output_tokens=fitted.output_tokens,
            default_tolerance=fitted.tolerance,
            sentence_encoder=embeddings.sentence_encoder,
            fingerprint=embeddings.fingerprint,
        )


def _about(config: EvaluateConfig, router: Router, graded: GradedStore) -> dict[str, str]:
    encoder = router.encoder_identity
    return {
        "Prompts": f"{config.activations}, of {graded.store.manifest.corpus}",
        "Outcomes": config.outcomes,
        "Router": f"{config.router}, version {router.version}",
        "Encoder": f"{encoder.spec.model}, {', '.join(column.name for column in router.columns)}",
        "Split": router.split.describe(),
        "Sentence encoder": config.sentence_encoder if config.corpus or config.embeddings else "none: give --corpus",
        "Versions": versions(),
    }
