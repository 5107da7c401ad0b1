"""The loaded router as the playground shows it."""

from __future__ import annotations

from pydantic import Field

from prefill_router.common.validation import StrictModel
from prefill_serve.wire import MISSING_ENCODERS


class ServedTarget(StrictModel):
    name: str
    input_price: float = Field(description="USD per million tokens")
    output_price: float = Field(description="USD per million tokens")
    price_source: str | None = Field(None, description="Name and table that the prices were taken from, if they were")
    can_answer: bool = Field(description="The gateway can send calls to it")


class CurvePoint(StrictModel):
    """Cost and accuracy of the router from this tolerance on, on its validation prompts."""

    tolerance: float
    cost_usd: float = Field(description="Mean, of a prompt")
    accuracy: float


class SinglePoint(StrictModel):
    """Cost and accuracy of sending all prompts to one target, on the same prompts."""

    target: str
    cost_usd: float = Field(description="Mean, of a prompt")
    accuracy: float


class RouterCard(StrictModel):
    """The loaded router, and its validation results at the prices of its training."""

    router_version: str
    encoder: str
    missing_encoders: list[str] = MISSING_ENCODERS
    tolerance: float
    targets: list[ServedTarget]
    curve: list[CurvePoint] = Field(description="By ascending tolerance; empty if it was not recorded")
    singles: list[SinglePoint]
    num_validation: int | None = Field(None, description="Prompts of which the curve is, if it was recorded")
    enough_validation: int = Field(description="With fewer prompts the curve is mostly noise")
