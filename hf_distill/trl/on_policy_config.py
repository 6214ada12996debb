"""The arguments of on-policy distillation."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from trl import DistillationConfig

from ..core.schedule import Points, parse_schedule
from ..errors import collect_errors, raise_if_any
from ..trainer.config import DistillArguments

_FIELDS = DistillArguments.__dataclass_fields__


@dataclass
class OnPolicyDistillConfig(DistillArguments, DistillationConfig):
    """`trl.DistillationConfig` with the fields of `DistillArguments`; by default reverse KL at T = 1, and alpha = 1.

    Raises:
        DistillError: a value is out of range, or a field of TRL is set that this class replaces; the message lists all
            problems.
    """

    # The base class does not annotate it, so that it counts as an attribute of instances.
    _VALID_DICT_FIELDS: ClassVar = [  # type: ignore[misc]
        *DistillationConfig._VALID_DICT_FIELDS,
        *DistillArguments._DICT_FIELDS,
    ]

    temperature: float = field(default=1.0, metadata=_FIELDS["temperature"].metadata)
    alpha: float = field(default=1.0, metadata=_FIELDS["alpha"].metadata)
    divergence: dict | str | None = field(default="reverse_kl", metadata=_FIELDS["divergence"].metadata)
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Temperature at which the student generates completions."}
    )
    on_policy_fraction: list | str | float | None = field(
        default=1.0,
        metadata={
            "help": "Share of the rows, in [0, 1], for which the student generates completions. The other rows keep "
            "the completions of the data set, and only these have hard labels. A number, or a schedule "
            "[[progress, share], ...] (or its JSON)."
        },
    )

    def __post_init__(self) -> None:
        problems: list[str] = []
        with collect_errors(problems):
            DistillArguments.__post_init__(self)
        with collect_errors(problems):
            points = self.fraction
            self.on_policy_fraction = points[0][1] if len(points) == 1 else [list(point) for point in points]
            if self.alpha < 1 and not self.is_mixed:
                problems.append(
                    f"alpha is {self.alpha}, but only the data set's completions have hard labels, and with "
                    "on_policy_fraction=1 none of them is used: use alpha=1, or a smaller on_policy_fraction"
                )
        if not (self.sampling_temperature > 0 and math.isfinite(self.sampling_temperature)):
            problems.append(f"sampling_temperature is {self.sampling_temperature}; it must be a positive number")
        if self.beta != 1.0:
            problems.append(
                f"beta={self.beta} is TRL's option for the divergence, which is not used: use divergence='forward_kl' "
                "(its 0), 'reverse_kl' (its 1) or {'name': 'js', 'beta': ...}"
            )
        raise_if_any(problems)
        DistillationConfig.__post_init__(self)

    @property
    def fraction(self) -> Points:
        """`on_policy_fraction` as the points of a schedule."""
        return parse_schedule(self.on_policy_fraction, "on_policy_fraction", 0, 1)

    @property
    def is_mixed(self) -> bool:
        """Whether some rows keep the completions of the data set."""
        return min(share for _, share in self.fraction) < 1
