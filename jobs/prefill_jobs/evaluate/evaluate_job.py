"""`evaluate`: scores a router and baselines on held-out prompts, and writes a JSON and an HTML report."""

# N prompts, T targets

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.embeddings import Embeddings, embed, fetch_sentence_encoder, load_embeddings
from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.graded.leakage import held_out
from prefill_jobs.graded.predictions import GradedPrediction, predict_graded
from prefill_jobs.graded.reward_threshold import shared_threshold
from prefill_jobs.options import EvaluateConfig
from prefill_jobs.runtime import cluster
from prefill_jobs.train.probe_job import load_probes
from prefill_router import storage
from prefill_router.baselines import NearestNeighbours
from prefill_router.baselines.baseline_router import BaselineRouter
from prefill_router.baselines.fitting import Fitted, Prompts, fit_all, fit_one
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.corpus.split import Part
from prefill_router.corpus.split_groups import SplitGroups, of_corpus
from prefill_router.evaluation.contenders import Contender, HeldOut, oracle, scoring
from prefill_router.evaluation.contenders import evaluate as score
from prefill_router.evaluation.learning_curve import LearningCurve, learning_curve
from prefill_router.evaluation.results import WITHOUT, Evaluation
from prefill_router.outcomes import check_columns
from prefill_router.predictor.answer_length import median_tokens
from prefill_router.reports import evaluation_page
from prefill_router.reports.versions import versions
from prefill_router.router.artifact import MANIFEST, Router


def evaluate(config: EvaluateConfig, notice: str | None = None) -> Evaluation:
    """Writes report.json and report.html to `config.out`, with `notice` at the top of the page.

    Scores are on held-out prompts; baselines are fitted on training prompts. With several folds, each fold's router is
    scored on its own held-out prompts, and the learning curve is the first fold's. Raises UserError if a held-out
    prompt repeats a training prompt.
    """
    storage.check_output(config.out)
    loaded = {uri: Router.load(uri) for uri in _folds(config.router)}
    correct_at = shared_threshold(loaded, config.correct_at)
    routers = list(loaded.values())
    router = routers[0]
    check_columns(config.outcomes)
    probes = None if config.probe is None else load_probes(config.probe)
    sentence_encoder = _sentence_encoder(config)
    groups = None if config.corpus is None else of_corpus(config.corpus)
    graded = GradedStore.open(
        config.activations,
        config.outcomes,
        router.pool,
        ignore_unknown=config.ignore_unknown,
        groups=groups,
        correct_at=correct_at,
    )
    cluster.connect()
    encoders = _in_all(routers)
    trials = _trials(routers, graded, _embeddings(config, sentence_encoder), drop=config.drop_leaked)
    result = score(
        router.pool,
        router.version,
        _together(trial.prompts for trial in trials),
        _joined(trial.router_as_contender() for trial in trials),
        [
            _joined(contenders)
            for contenders in zip(*(trial.contenders(config.keep_baselines, encoders) for trial in trials), strict=True)
        ],
        p_uncalibrated=np.concatenate([trial.predicted.p_uncalibrated[trial.is_held_out] for trial in trials]),
        median_output_tokens=np.concatenate([trial.medians for trial in trials]),
        num_seen=len(trials[0].predicted.keys) - sum(int(trial.is_held_out.sum()) for trial in trials),
        num_validation=router.training.get("num_validation"),
        num_draws=config.draws,
        about=_about(config, router, graded, sentence_encoder),
    )
    result = replace(result, learning=trials[0].learning())
    evaluation_page.write(config.out, result, probes, notice)
    return result


def _folds(uri: str) -> list[str]:
    """The URI of a router, or those of the folds below it."""
    folds = [storage.join(uri, name) for name in storage.list_names(uri) if name.startswith("fold-")]
    return [uri] if storage.exists(storage.join(uri, MANIFEST)) or not folds else folds


def _in_all(routers: Sequence[Router]) -> list[str]:
    """The names of the encoders that every router has beside others."""
    return [name for name in routers[0].encoders if name and all(name in router.encoders for router in routers)]


def _trials(
    routers: Sequence[Router], graded: GradedStore, embeddings: Embeddings | None, *, drop: bool
) -> list[FoldEvaluation]:
    """A trial per router. A prompt that is held out from several routers belongs to the first one's trial."""
    trials: list[FoldEvaluation] = []
    for router in routers:
        predicted = predict_graded(router, graded, with_features=True)
        is_new = held_out([router], predicted.keys, graded.groups, drop=drop)
        for trial in trials:
            is_new = is_new & ~trial.is_held_out
        trials.append(FoldEvaluation(router, predicted, graded.groups, embeddings, is_new))
    return trials


def _together(parts: Iterable[HeldOut]) -> HeldOut:
    """Concatenates the held-out prompts of all folds."""
    fields = zip(*((p.num_tokens, p.correct, p.output_tokens, p.clusters, p.cost_usd) for p in parts), strict=True)
    return HeldOut(*(np.concatenate(values) for values in fields))


def _joined(parts: Iterable[Contender]) -> Contender:
    """Concatenates the predictions of all folds' contenders; the tolerance is their mean, to three decimals."""
    of_folds = list(parts)
    return replace(
        of_folds[0],
        p_correct=np.concatenate([part.p_correct for part in of_folds]),
        expected_output_tokens=np.concatenate([part.expected_output_tokens for part in of_folds]),
        tolerance=round(float(np.mean([part.tolerance for part in of_folds])), 3),
    )


def _sentence_encoder(config: EvaluateConfig) -> str | None:
    """The sentence encoder that embeds the corpus; None without a corpus, or if the default one is not installed.

    Raises UserError if one that was chosen, or that other options need, is missing.
    """
    if config.corpus is None:
        return None
    try:
        fetch_sentence_encoder(config.sentence_encoder)
    except UserError as error:
        if {"sentence_encoder", "embeddings", "keep_baselines"} & config.model_fields_set:
            raise
        say(f"evaluate: baselines on sentence embeddings are left out: {error}")
        return None
    return config.sentence_encoder


def _embeddings(config: EvaluateConfig, sentence_encoder: str | None) -> Embeddings | None:
    """The embeddings at `config.embeddings`, computed first if there is an encoder; None without both."""
    kept = config.embeddings or storage.join(config.out, "embeddings")
    if config.corpus is not None and sentence_encoder is not None:
        return embed(config.corpus, sentence_encoder, kept)
    return None if config.embeddings is None else load_embeddings(kept)


@dataclass(frozen=True)
class FoldEvaluation:
    """A router with the graded prompts of a store, some of which it was trained on and others it is scored on."""

    router: Router
    predicted: GradedPrediction
    groups: SplitGroups
    embeddings: Embeddings | None
    is_held_out: NDArray[np.bool_]  # (N,)

    @property
    def is_seen(self) -> NDArray[np.bool_]:
        return np.isin(self.predicted.keys, self.router.training_prompts)

    @property
    def is_training(self) -> NDArray[np.bool_]:
        """Whether each prompt (N,) is in the training part, and not in the validation part."""
        parts = self.router.split.parts(self.groups.of(self.predicted.keys))
        return np.asarray(self.is_seen & (parts != Part.VALIDATION))

    @property
    def prompts(self) -> HeldOut:
        rows, of = self.is_held_out, self.predicted
        clusters = self.groups.of(of.keys[rows])
        return HeldOut(of.num_tokens[rows], of.correct[rows], of.output_tokens[rows], clusters, of.cost_usd[rows])

    @property
    def medians(self) -> NDArray[np.float32]:
        return median_tokens(self.predicted.estimates.log_lengths[self.is_held_out])

    def router_as_contender(self) -> Contender:
        p_correct, expected_output_tokens = (values[self.is_held_out] for values in self.predicted.prediction)
        tolerance = self.router.default_tolerance
        return Contender("router", "prefill router", p_correct, expected_output_tokens, tolerance)

    def learning(self) -> LearningCurve:
        """The learning curve of a kernel machine like the router's, on the pool's targets."""
        features, training = self.predicted.features, self.is_training
        assert features is not None
        try:
            score = scoring(self.router.pool, self.prompts, self.router_as_contender())
        except UserError as error:  # one fold may have too few prompts, although all folds together have enough
            return LearningCurve(silence=str(error))
        say(f"evaluate: compute a learning curve on {int(training.sum()):,} training prompts")
        return learning_curve(features[training], self.predicted.correct[training], features[self.is_held_out], score)

    def contenders(self, keep: str | None, encoders: Sequence[str]) -> Iterator[Contender]:
        """Yields every baseline that the data allow, and the router without each of `encoders`.

        Saves baselines that can be served to `keep`.
        """
        readable, held, is_training = self._readable(), self.is_held_out, self.is_training
        is_validation = self.is_seen & ~is_training
        training, validation = readable[is_training], readable[is_validation]
        if not len(training):
            say("evaluate: no training prompt is in the store: baselines are not fitted")
        else:
            for fitted in fit_all(self.router.pool, training, validation):
                yield self._contender(fitted, readable[held])
                if keep is not None and self.embeddings is not None:
                    folder = re.sub(r"[^\w.-]+", "-", fitted.title)
                    self._served(fitted, self.embeddings).save(storage.join(keep, folder))
            activations = replace(readable, embedding=self.predicted.features)
            parts = (activations[rows] for rows in (is_training, is_validation))
            neighbours = fit_one(self.router.pool, "knn_activations", NearestNeighbours(), *parts)
            neighbours = replace(neighbours, title="k nearest neighbours by activations")
            yield self._contender(neighbours, activations[held])
        yield from map(self._without, encoders)
        yield oracle(self.prompts, self.predicted.prediction.expected_output_tokens[held])

    def _without(self, encoder: str) -> Contender:
        """The router where one of its encoders is missing."""
        router, features = self.router, self.predicted.features
        assert features is not None
        prediction = router.predict_features(router.without(features[self.is_held_out], [encoder]))
        return Contender(f"{WITHOUT}{encoder}", f"{WITHOUT}{encoder}", *prediction, router.default_tolerance)

    def _readable(self) -> Prompts:
        of = self.predicted
        if self.embeddings is None:
            return Prompts(of.num_tokens, of.correct, of.output_tokens, of.num_tokens, None, of.cost_usd)
        is_known, vectors, lengths = self.embeddings.at(of.keys)
        if not is_known.all():
            say(
                f"evaluate: {int((~is_known).sum()):,} prompts have no embedding: semantic baselines see zeros for them"
            )
        return Prompts(of.num_tokens, of.correct, of.output_tokens, lengths, vectors, of.cost_usd)

    def _contender(self, fitted: Fitted, held_out: Prompts) -> Contender:
        p = fitted.p_correct(held_out)
        expected = np.broadcast_to(fitted.output_tokens, p.shape)
        name = fitted.title if fitted.name == "always" else fitted.name
        return Contender(name, fitted.title, p, expected, fitted.tolerance)

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


def _about(config: EvaluateConfig, router: Router, graded: GradedStore, sentence_encoder: str | None) -> dict[str, str]:
    none = "none (give --corpus)" if config.corpus is None else f"none ({config.sentence_encoder} is not installed)"
    return {
        "Prompts": f"{config.activations}, of {graded.store.corpus}",
        "Outcomes": config.outcomes,
        "Router": f"{config.router}, version {router.version}",
        "Encoder": ", ".join(identity.spec.model for identity in router.encoders.values()),
        "Activations": ", ".join(column.name for column in router.columns),
        "Split": router.split.describe(),
        "Sentence encoder": sentence_encoder or config.embeddings or none,
        "Versions": versions(),
    }
