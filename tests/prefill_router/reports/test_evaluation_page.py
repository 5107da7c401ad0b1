from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.axes import Axes

from prefill_router.common.errors import UserError
from prefill_router.common.money import usd
from prefill_router.common.schema import ActivationColumn, Pooling
from prefill_router.evaluation.contenders import Contender, HeldOut, evaluate, oracle
from prefill_router.evaluation.learning_curve import LearnedFigure, LearningCurve, Outlook
from prefill_router.evaluation.results import Evaluation
from prefill_router.metrics import Interval
from prefill_router.policy.pool import Pool, Target
from prefill_router.policy.selection import choose
from prefill_router.probe.layer_scores import LayerProbe
from prefill_router.reports.evaluation_page import (
    against_baselines,
    calibration_line,
    costs_line,
    headline,
    metric_rows,
    neighbours_line,
    outlook,
    render_html,
)
from prefill_router.reports.figures import (
    NARROW,
    WIDE,
    curve_figure,
    learning_figure,
    probe_figure,
    risk_figure,
    to_svg,
)
from prefill_router.reports.number_format import Table, exactly, in_words, once, shown
from prefill_router.reports.verdict import verdict

pytestmark = pytest.mark.usefixtures("no_plots")

FETCHING = {"script", "link", "img", "image", "iframe", "object", "embed", "video", "audio", "source", "base"}
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


class Page(HTMLParser):
    """The tags, links and visible text of a page; an <svg> counts as a picture without text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.num_svgs = 0
        self.hidden: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src", "srcset")]
        self.num_svgs += tag == "svg"
        if self.hidden is None and tag in ("svg", "style"):
            self.hidden = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self.hidden:
            self.hidden = None

    def handle_data(self, data: str) -> None:
        if self.hidden is None:
            self.text += data


@cache
def evaluation(
    names: tuple[str, ...] = ("large", "small"), prices: tuple[float, ...] = (1.0, 0.1), *, judged: bool = False
) -> Evaluation:
    rng = np.random.default_rng(0)
    num_prompts, shape = 60, (60, len(names))
    p, expected = rng.random(shape), rng.uniform(50, 300, shape)
    held_out = HeldOut(
        num_tokens=rng.integers(10, 300, num_prompts),
        correct=(0.85 * p if judged else rng.random(shape) < p).astype(np.float32),
        output_tokens=rng.integers(5, 400, shape).astype(np.float32),
    )
    targets = tuple(Target(name=n, input_price=x, output_price=4 * x) for n, x in zip(names, prices, strict=True))
    rivals = [
        Contender("knn", "k nearest neighbours", rng.random(shape), expected, 0.0),
        *(
            Contender(f"always {n}", f"always {n}", np.tile(np.eye(len(names))[t], (num_prompts, 1)), expected, 0.0)
            for t, n in enumerate(names)
        ),
        oracle(held_out, expected),
    ]
    return evaluate(
        Pool(name="a pool", targets=targets),
        "v1abc",
        held_out,
        Contender("router", "prefill router", p, expected, 0.125),
        rivals,
        p_uncalibrated=p**2,
        num_seen=1234,
        num_draws=30,
        about={"Outcomes": "s3://bucket/<outcomes>"},
    )


def probes(names: tuple[str, ...] = ("large", "small"), encoder: str = "an-encoder") -> list[LayerProbe]:
    return [
        LayerProbe(
            encoder, ActivationColumn(pooling, layer), target, 10.0 + layer, j, j - 0.01, j - 0.05, j + 0.03, 100, 0.5
        )
        for target in names
        for pooling in POOLINGS
        for layer, j in ((0, 0.1), (6, 0.4), (12, 0.3))
    ]


def learning() -> LearningCurve:
    """A curve with an outlook for mean AUC, and with measurements alone for MDP-AUCCC."""
    auc = LearnedFigure(
        measured=[Interval(0.6, 0.58, 0.62), Interval(0.65, 0.64, 0.66)],
        law=[[500.0, 0.6, 0.58, 0.62], [1000.0, 0.65, 0.64, 0.66], [4000.0, 0.7, 0.68, 0.72]],
        outlooks=[
            Outlook(2, 2000, Interval(0.68, 0.67, 0.69), Interval(0.03, 0.02, 0.04)),
            Outlook(4, 4000, Interval(0.7, 0.68, 0.72), Interval(0.05, 0.03, 0.07)),
        ],
        silence=None,
    )
    mdp = LearnedFigure([Interval(0.004, -0.01, 0.02), Interval(0.003, -0.01, 0.02)], [], [], "it does not rise")
    return LearningCurve(60, [500, 1000], [2, 1], {"mean_auc": auc, "mdp_auccc": mdp})


def dots_of(axes: Axes) -> list[tuple[float, float]]:
    """The positions of the round markers."""
    dots = [line.get_xydata() for line in axes.lines if line.get_marker() == "o"]
    return [(float(x), float(y)) for line in dots for x, y in np.asarray(line)]


def test_page_contains_every_figure_inline_and_explains_it_and_every_metric_on_demand(plots: None) -> None:
    html = render_html(evaluation(), probes())
    assert Page(html).num_svgs == 12
    details = re.findall(r"<details>.*?</details>", html, re.DOTALL)
    assert len(details) == 6 + 4  # figures, and tables
    told = "".join(details)
    for term in ("tolerance", "gap closed", "MDP-AUCCC", "AUC", "ECE", "Brier score", "APGR", "CPT", "AIQ", "AURC"):
        assert f"<dt>{term}</dt>" in told
    assert "oracle, which knows" in told


@pytest.mark.parametrize("none", [None, []])
def test_page_without_probes_contains_the_other_figures(plots: None, none: list[LayerProbe] | None) -> None:
    page = Page(render_html(evaluation(), none))
    assert page.num_svgs == 10
    assert "Layer probes" not in page.text


def test_page_fetches_nothing() -> None:
    html = render_html(evaluation(), probes(), "a notice")
    page = Page(html)
    assert not FETCHING & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in html
    assert all(url.startswith("#") for url in re.findall(r"url\([\"']?([^)]*)", html))


def test_page_states_the_data_and_the_scores() -> None:
    e = evaluation()
    text = " ".join(Page(render_html(e)).text.split())
    assert "Routing report: a pool" in text
    assert "Router v1abc, tolerance 0.125." in text
    assert "60 held-out prompts, 60 of them with an outcome for every target" in text
    assert "1,234 prompts were left out because they were used in training" in text
    assert headline(e) in text
    assert all(part in text for part in verdict(e)[:2])
    assert f"{e.router.accuracy:.1%}" in text
    for target, accuracy, auc in zip(e.targets, e.target_accuracy, e.router.auc, strict=True):
        assert re.search(rf"{target} ?{accuracy:.1%} ?\$[0-9.e-]+ ?[0-9.]+% ?{auc:.3f}", text)
    assert "s3://bucket/<outcomes>" in text


def test_page_shows_a_notice_only_if_there_is_one() -> None:
    notice = "Answers are <simulated> & made up."
    html = render_html(evaluation(), notice=notice)
    assert notice in Page(html).text
    assert "<simulated>" not in html
    assert 'class="notice"' not in render_html(evaluation())


def test_any_target_name_is_shown_as_text(plots: None) -> None:
    names = ("<script>alert(1)</script>", "a<b>&\"c'", "--><img src=x>", "</svg><b>", "$x$", "$\\frac$", "_hidden")
    page = Page(render_html(evaluation(names, (1.0,) * len(names)), probes(names)))
    for name in names:
        assert page.text.count(name) >= 2
    assert not {"script", "img", "b"} & set(page.tags)
    assert page.num_svgs == 12


def test_every_contender_has_a_row_and_the_router_is_first(plots: None) -> None:
    e = evaluation()
    text = Page(render_html(e)).text
    places = [text.index(f"\n{s.title}") for s in e.standings]
    assert places[0] == min(places)
    alone = replace(e, standings=e.standings[:1])
    page = Page(render_html(alone))
    assert "No baseline could be fitted" in page.text
    assert page.num_svgs == 10


def test_missing_outcomes_are_reported_if_there_are_any() -> None:
    e = evaluation()
    assert "lack an outcome" not in Page(render_html(e)).text
    text = Page(render_html(replace(e, num_complete=48, accuracy_of_complete=0.875))).text
    assert "12 prompts lack an outcome for at least one target" in text
    assert "would be 87.5% instead of" in text


def test_a_report_on_judged_rewards_states_mean_rewards() -> None:
    e = evaluation(judged=True)
    text = " ".join(Page(render_html(e)).text.split())
    assert headline(e).startswith("The mean reward is ")
    assert headline(e) in text
    assert "Cost and mean reward" in text
    assert "the share of the pairs of answers with different rewards that P(correct) puts in the right order" in text
    assert all(part in text for part in verdict(e)[:2])
    assert "accuracy" not in text.replace("cost-accuracy frontier", "")
    assert "mean reward" in dict(metric_rows(e.router, e.quality))
    binary = Page(render_html(evaluation())).text
    assert "reward" not in binary


def test_a_report_says_which_costs_were_billed() -> None:
    e = evaluation()
    assert costs_line(e) == "The costs shown are computed from the pool's prices and the actual answer lengths."
    assert costs_line(replace(e, billed_share=1.0)) == "The costs shown are as billed."
    assert costs_line(replace(e, billed_share=0.25)).startswith("25.0% of the answers are counted as billed; ")
    assert costs_line(e) in " ".join(Page(render_html(e)).text.split())


def test_undefined_values_are_dashes() -> None:
    e = evaluation()
    nan = float("nan")
    nothing = Interval(nan, nan, nan)
    ours = e.standings[0]
    ours = replace(
        ours,
        scores=replace(ours.scores, efficacy=nan, auc=[nan, 0.5]),
        intervals=dict.fromkeys(ours.intervals, nothing),
    )
    point = replace(e.operating_points[0], efficacy=nothing, saving_against_best_single=nothing)
    unknown = replace(
        e,
        standings=[ours, *e.standings[1:]],
        operating_points=[point],
        length_error_tokens=nan,
        length_error_median_rule_tokens=nan,
    )
    text = Page(render_html(unknown)).text
    assert "–" in text
    assert not re.search(r"\bnan\b", text)


SHOWN = Interval(0.0005, 0.0004, 0.0006)  # a saving in USD per prompt


def headline_for(e: Evaluation, saving: Interval, saved_usd: Interval = SHOWN, **scores: float) -> str:
    """The headline for these scores of the router, which is as accurate as the best single target."""
    ours = replace(e.standings[0], scores=replace(e.router, **scores))
    point = replace(
        e.operating_points[0],
        accuracy=Interval(0.75, 0.7, 0.8),
        accuracy_less_best_single=Interval(0.0, -0.01, 0.01),
        saved_usd=saved_usd,
        saving_against_best_single=saving,
    )
    return headline(replace(e, standings=[ours, *e.standings[1:]], operating_points=[point], num_complete=200))


def test_headline_compares_with_the_best_single_target() -> None:
    e = replace(evaluation(), target_accuracy=[0.5, 0.7])
    saving = Interval(0.75, 0.7, 0.81)
    assert headline_for(e, saving, cost=0.001, best_single_accuracy=0.7, best_single_cost=0.004) == (
        "75.0% (70.0% to 80.0%) of the answers are right at $1.00 per 1,000 prompts, compared with 70.0% at $4.00 for "
        "small, the best single target: 75.0% (70.0% to 81.0%) saved."
    )


def test_headline_of_a_saving_that_is_not_shown_does_not_contradict_the_verdict() -> None:
    unsure = headline_for(evaluation(), Interval(0.75, -0.1, 0.81), Interval(0.0005, -0.0001, 0.0011))
    assert unsure.endswith("75.0% (-10.0% to 81.0%) saved, but these prompts do not show that it pays.")


def test_headline_names_the_cheaper_of_two_best_targets() -> None:
    e = replace(evaluation(), target_accuracy=[0.7, 0.7], target_cost=[0.01, 0.002])
    assert "for small, the best single target" in headline_for(e, Interval(0.1, 0.0, 0.2))


def test_headline_of_a_router_that_costs_more_says_so() -> None:
    assert headline_for(evaluation(), Interval(-0.5, -0.6, -0.4)).endswith("target: 50.0% (40.0% to 60.0%) more.")
    assert headline_for(evaluation(), Interval(-9.0, -10.0, -8.0)).endswith("target: 10.0 (9.0 to 11.0) times as much.")


def test_headline_claims_no_saving_against_a_free_target() -> None:
    assert "saved" not in headline_for(evaluation(), Interval(*[float("nan")] * 3), best_single_cost=0.0)


@pytest.mark.parametrize(
    ("less", "num_beaten", "verdict"),
    [
        (Interval(0.004, 0.001, 0.007), 1, "the router is better"),
        (Interval(0.004, -0.001, 0.007), 0, "the difference is not significant"),
        (Interval(-0.004, -0.007, -0.001), 0, "the router is worse"),
    ],
)
def test_the_verdict_follows_the_interval(less: Interval, num_beaten: int, verdict: str) -> None:
    e = evaluation()
    knn = replace(e.standings[1], router_less_this={**e.standings[1].router_less_this, "mdp_auccc": less})
    text = against_baselines(replace(e, standings=[e.standings[0], knn]))
    assert f"adds significantly more than {num_beaten} of 1 baselines" in text
    assert f"Against the best baseline, k nearest neighbours, {verdict}: MDP-AUCCC" in text
    assert neighbours_line(knn) == (
        "k nearest neighbours is a baseline: it expects of each target what it achieved on the most similar training "
        f"prompts. Over all tolerances, {verdict}: MDP-AUCCC x 1000 differs by {in_words(less, '+m')}, and the 95 % "
        f"interval {'includes' if verdict.endswith('not significant') else 'excludes'} 0."
    )


def test_page_shows_the_expected_gain_from_more_outcomes(plots: None) -> None:
    text = outlook(learning())
    assert text == (
        "2,000 training prompts (twice as many) should change mean AUC by +0.030 (+0.020 to +0.040); 4,000 training "
        "prompts (four times as many) should change mean AUC by +0.050 (+0.030 to +0.070). The gain in MDP-AUCCC x "
        "1000 cannot be estimated: it does not rise."
    )
    assert "uses at most" in outlook(replace(learning(), sizes=[2000, 4000]))
    page = Page(render_html(replace(evaluation(), learning=learning())))
    assert text in page.text
    counts = (
        "Trained on all 1,000 training prompts and on disjoint subsets of them (2 of 500), and scored on 60 held-out"
    )
    assert counts in page.text
    assert page.num_svgs == 12
    page = Page(render_html(replace(evaluation(), learning=LearningCurve(silence="there are 3 prompts"))))
    assert "Expected gain from more outcomes Not available: there are 3 prompts." in " ".join(page.text.split())
    assert page.num_svgs == 10
    assert "more outcomes" not in Page(render_html(evaluation())).text


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_learning_figure_shows_measurements_and_the_law_beyond_them(width: float) -> None:
    auc, mdp = learning_figure(learning(), width).axes
    assert dots_of(auc) == [(500.0, 0.6), (1000.0, 0.65), (2000.0, 0.68), (4000.0, 0.7)]
    assert dots_of(mdp) == [(500.0, 4.0), (1000.0, 3.0)]
    lines = {line.get_linestyle(): line.get_xdata() for line in auc.lines if line.get_marker() == "None"}
    assert np.max(lines["-"]) == np.min(lines["--"]) == 1000.0


def test_figures_are_shown_short() -> None:
    assert shown(0.0012345, "$") == "$1.23"
    assert shown(0.001, "$") == "$1.00"
    assert shown(2e-7, "$") == "$0.000200"
    assert shown(-1e-9, "%") == "0.0%"
    assert shown(0.0123, "+m") == "+12.3"


def test_calibration_without_effect_is_reported() -> None:
    e = evaluation()
    assert calibration_line(e).endswith(" before calibration")
    reliability = {name: [[[0.5, 0.5, 9.0]]] * 2 for name in ("uncalibrated", "calibrated")}
    same = replace(e, calibration=replace(e.calibration, ece_uncalibrated=e.calibration.ece, reliability=reliability))
    assert calibration_line(same).endswith(": calibration changed nothing")
    assert "Calibration changed nothing for large, small: " in Page(render_html(same)).text
    assert "changed nothing" not in Page(render_html(e)).text


def test_metric_rows_name_and_show_each_metric() -> None:
    scores = replace(evaluation().router, accuracy=0.5, cost=0.00123, efficacy=float("nan"), p_auccc=0.25)
    rows = dict(metric_rows(scores))
    assert rows["accuracy"] == "50.0%"
    assert rows["cost per 1,000 prompts"] == "$1.23"
    assert rows["efficacy (gap closed)"] == "–"
    assert rows["P-AUCCC"] == "0.2500"


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("prices", [(1.0, 0.1), (1.0, 0.0), (0.0, 0.0)])
def test_curve_figure_shows_every_target_including_a_free_one(prices: tuple[float, ...], width: float) -> None:
    e = evaluation(prices=prices)
    axes = curve_figure(e, width).axes[0]
    shown = dots_of(axes)
    per_1000 = [1000.0 * cost for cost in e.target_cost]
    assert shown == list(zip(per_1000, e.target_accuracy, strict=True))
    left, right = axes.get_xlim()
    assert all(left <= cost <= right for cost, _ in shown)


def test_points_of_the_cost_curve_tell_tolerance_cost_and_accuracy_to_pointer_and_keyboard() -> None:
    e = evaluation(names=("<large>", "small"))
    svg = to_svg(curve_figure(e, WIDE))
    points = re.findall(r'<g class="tip" tabindex="0" role="img" aria-label="([^"]*)"><text[^>]*>([^<]*)</text>', svg)
    assert all(label == text for label, text in points)
    told = [unescape(label) for label, _ in points]
    tolerances = [*e.tolerances, (e.tolerance, e.router.cost, e.router.accuracy)]
    singles = zip(e.targets, e.target_cost, e.target_accuracy, strict=True)
    names = [(f"tolerance {exactly(tolerance)}", cost, right) for tolerance, cost, right in tolerances]
    names[-1] = (f"default {names[-1][0]}", *names[-1][1:])
    expected = [(name, f"{usd(1000 * cost)} per 1,000 prompts, accuracy {right:.1%}") for name, cost, right in names]
    expected += [(t, f"{usd(1000 * cost)} per 1,000 prompts, accuracy {right:.1%}") for t, cost, right in singles]
    assert told == [f"{name}: {figures}" for name, figures in expected]
    costs = [cost for _, cost, _ in e.tolerances]
    assert len(set(costs)) == len(costs) > 5


def test_who_copies_a_tolerance_gets_the_point_that_it_stands_at() -> None:
    rng = np.random.default_rng(5)
    p = 0.5 + 0.004 * rng.random((400, 2))  # many points of the curve within a thousandth
    correct = (rng.random(p.shape) < [0.7, 0.6]).astype(np.float32)
    expected, num_tokens = np.full(p.shape, 100.0), np.full(400, 50)
    targets = tuple(Target(name=n, input_price=x, output_price=x) for n, x in (("large", 1.0), ("small", 0.1)))
    held_out = HeldOut(num_tokens=num_tokens, correct=correct, output_tokens=expected.astype(np.float32))
    router = Contender("router", "prefill router", p, expected, 0.0004)
    e = evaluate(Pool(name="a pool", targets=targets), "v1", held_out, router, num_draws=5)
    cost = e.target_cost
    points = {exactly(point.tolerance): (point.cost.value, point.accuracy.value) for point in e.operating_points}
    points |= {exactly(tolerance): (paid, right) for tolerance, paid, right in e.tolerances}
    assert len({text for text in points if len(text) > len("0.000")}) > 2
    for text, (paid, right) in points.items():
        choice = choose(p, np.tile(cost, (400, 1)), float(text))
        assert np.take(cost, choice).mean() == pytest.approx(paid, rel=1e-9)
        assert correct[np.arange(400), choice].mean() == pytest.approx(right, rel=1e-9)
        assert len(text) <= len("0.0000000")


@pytest.mark.parametrize(
    ("tolerance", "text"), [(0.0, "0.000"), (0.05, "0.050"), (0.02034, "0.02034"), (1e-5, "0.00001"), (1.0, "1.000")]
)
def test_a_tolerance_is_shown_so_that_it_can_be_copied(tolerance: float, text: str) -> None:
    assert exactly(tolerance) == text
    assert float(exactly(np.nextafter(tolerance, 2.0))) == np.nextafter(tolerance, 2.0)


def test_columns_that_are_identical_are_shown_once() -> None:
    rows: Table = [["a", "1", ("2", "1 to 3"), ("2", "1 to 3")], ["b", "4", "5", "5"]]
    heads, merged = once(["", "x", "y", "z"], rows, "y", "z")
    assert heads == ["", "x", "y, and z"]
    assert merged == [["a", "1", ("2", "1 to 3")], ["b", "4", "5"]]
    assert once(["", "x", "y", "z"], rows, "x", "y") == (["", "x", "y", "z"], rows)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_no_legend_is_on_a_curve(width: float) -> None:
    for figure in (probe_figure(probes(), width), risk_figure(evaluation(), width)):
        figure.draw_without_rendering()
        for axes in figure.axes:
            assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1


def test_probe_figure_marks_the_chosen_layer_of_each_target() -> None:
    fisher_axes = probe_figure(probes()).axes[0]
    assert dots_of(fisher_axes) == pytest.approx(np.array([(6.0, 0.39)] * 2))
    assert len(fisher_axes.lines) == 2 * len(POOLINGS) + 2


def test_probe_figure_has_a_row_for_each_encoder() -> None:
    worse = [replace(p, fisher_j_corrected=p.fisher_j_corrected / 2) for p in probes(encoder="another")]
    axes = probe_figure([*probes(), *worse]).axes
    assert [a.get_title() for a in axes[::2]] == [f"Fisher separability by {e}" for e in ("an-encoder", "another")]
    assert [len(dots_of(a)) for a in axes] == [2, 0, 0, 0]


def test_probe_figure_without_a_layer_for_a_target_is_an_error() -> None:
    nothing = [replace(p, fisher_j_corrected=float("nan")) for p in probes()]
    with pytest.raises(UserError, match="all correct or all wrong"):
        probe_figure(nothing)


def test_svg_is_an_element_without_prologue() -> None:
    svg = to_svg(probe_figure(probes()))
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
