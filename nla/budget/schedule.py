"""Schedules: how the budget of a retraining tightens with the steps. `conf/schedule/` holds the presets."""

from abc import ABC, abstractmethod

from nla.machine.errors import UserError, require_fraction, require_integer


class Schedule(ABC):
    """The budget b(t) in parameters: b0 until step t_i, then falling to the final budget b_f at step T - t_f, then constant.

    Args:
        b0: budget at the start, as a multiple of the final budget.
        t_i, t_f: lengths of the warm-up and the cool-down, as fractions of the T steps of a retraining.
        interval: steps between two choices of the kept triplets. The last choice is always made at T - t_f.

    Raises:
        UserError: an argument is out of range; it names the setting.
    """

    def __init__(self, b0: float, t_i: float, t_f: float, interval: int) -> None:
        if not isinstance(b0, int | float) or not b0 >= 1:
            raise UserError(f"schedule.b0={b0} must be at least 1: it is a multiple of the final budget")
        for name, value in (("t_i", t_i), ("t_f", t_f)):
            require_fraction(f"schedule.{name}", value)
        if t_i + t_f >= 1:
            raise UserError(f"schedule.t_i={t_i} and schedule.t_f={t_f} leave nothing to tighten in; their sum must be below 1")
        require_integer("schedule.interval", interval, 1)
        self.b0, self.t_i, self.t_f, self.interval = b0, t_i, t_f, interval

    @abstractmethod
    def remaining(self, p: float) -> float:
        """The remaining fraction of b0 - b_f after a fraction p of the tightening, 0 < p < 1."""

    def phases(self, steps: int) -> tuple[int, int]:
        """The number of steps after which the budget begins to fall, and the number after which it is final.

        Raises:
            UserError: no step remains between warm-up and cool-down.
        """
        begin, end = round(self.t_i * steps), steps - round(self.t_f * steps)
        if begin >= end:
            raise UserError(
                f"schedule.t_i={self.t_i} and schedule.t_f={self.t_f} are {begin} and {steps - end} of retrain.steps={steps}, "
                "and leave no step to tighten the budget in; lower them, or train longer"
            )
        return begin, end

    def budget(self, done: int, steps: int, start: int, final: int) -> int:
        """b(t) in parameters after `done` of `steps` steps, where b(t) falls from `start` to `final`."""
        begin, end = self.phases(steps)
        if done <= begin:
            return start
        if done >= end or start <= final:
            return final
        return final + int((start - final) * self.remaining((done - begin) / (end - begin)))

    def in_force(self, done: int, steps: int, start: int, final: int) -> int:
        """b(t) at the last choice of triplets, which the masks obey until the next: a staircase of `interval` steps."""
        begin, end = self.phases(steps)
        if done >= end:
            return final
        last = done - done % self.interval
        return self.budget(last, steps, start, final) if last > begin else start

    def chooses(self, done: int, steps: int) -> bool:
        """Whether the kept triplets are chosen again after `done` steps."""
        begin, end = self.phases(steps)
        return begin < done <= end and (done % self.interval == 0 or done == end)


class Constant(Schedule):
    """b(t) = b_f immediately after the warm-up."""

    def remaining(self, p: float) -> float:
        return 0.0


class Linear(Schedule):
    """b(t) = b_f + (b0 - b_f)(1 - p) with p as in `Cubic`."""

    def remaining(self, p: float) -> float:
        return 1 - p


class Cubic(Schedule):
    """b(t) = b_f + (b0 - b_f)(1 - p)^3 with p = (t - t_i) / (T - t_f - t_i) (NLA; AdaLoRA, Zhang et al., 2023)."""

    def remaining(self, p: float) -> float:
        return (1 - p) ** 3
