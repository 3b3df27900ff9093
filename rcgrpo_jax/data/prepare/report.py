"""What became of the rows of a data set: as text for people and as `prepare.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcgrpo_jax.data.prepare.parts import MOST_INSIDE, Part

FIRST = 5  # rows that are named for each reason; skipped.jsonl has all of them
TASKS = 30  # that the text lists; prepare.json has all of them
SUSPICIOUS = 1 / 3  # share of examples whose masks miss the change, above which the mask form is doubted


@dataclass(frozen=True)
class Report:
    """The result of a preparation.

    Args:
        title: What the data set is.
        whole: What became of its rows.
        published: Task -> rows that its authors name; the empty task stands for all.
        notes: Sentences about the input, such as files that are missing.
    """

    title: str
    whole: Part
    published: Mapping[str, int]
    notes: Sequence[str] = ()

    @property
    def reasons(self) -> dict[str, list[tuple[str, str, str]]]:
        """Reason -> (where, id, detail) of each skipped row; the most frequent first."""
        found: dict[str, list[tuple[str, str, str]]] = {}
        for where, identifier, reason, detail in self.whole.skipped:
            found.setdefault(reason, []).append((where, identifier, detail))
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    @property
    def warnings(self) -> list[str]:
        """What the reader should look at before training."""
        found, whole = [], self.whole
        if whole.compared and whole.outside / whole.compared > SUSPICIOUS:
            found.append(
                f"in {whole.outside:,} of {whole.compared:,} examples less than half of what the target changes lies "
                "in the mask: its form (--mask_form) is probably another one"
            )
        for task, count in self.published.items():
            rows = whole.read.get(task, 0) if task else sum(whole.read.values())
            if rows != count:
                found.append(f"{rows:,} rows{f' of {task}' if task else ''} read; {count:,} are published")
        return found + list(self.notes)

    def emptiness(self) -> str:
        """Why there is no example: how many rows there are, and the most frequent reason with its first row."""
        whole = self.whole
        if not whole.rows:
            return "there are no rows"
        if not whole.skipped:
            return f"none of {whole.rows:,} rows is of a task that was chosen; found {', '.join(whole.not_chosen)}"
        reason, rows = next(iter(self.reasons.items()))
        first = ": ".join(filter(None, (rows[0][0], rows[0][2])))
        return f"none of {whole.rows:,} rows is an example; {len(rows):,}: {reason} ({first})"

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        whole = self.whole
        return {
            "data_set": self.title,
            "rows": whole.rows,
            "examples": len(whole.names),
            "with_target": whole.targets,
            "with_caption": whole.captions,
            "rows_by_task": whole.read,
            "examples_by_task": whole.kept,
            "published_by_task": dict(self.published),
            "not_chosen_by_task": whole.not_chosen,
            "skipped": {
                reason: {
                    "rows": len(rows),
                    "first": [{"row": x, "id": y, "found": z} for x, y, z in rows[:FIRST]],
                }
                for reason, rows in self.reasons.items()
            },
            "change": {"compared": whole.compared, f"less_than_{MOST_INSIDE:g}_in_mask": whole.outside},
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        """The report for people."""
        whole = self.whole
        extra = f"{whole.targets:,} with a target, {whole.captions:,} with a caption"
        published = f" ({self.published['']:,} are published)" if "" in self.published else ""
        lines = [self.title, f"{whole.rows:,} rows read{published}, {len(whole.names):,} examples written ({extra})"]
        if {*whole.read} - {""}:
            lines.append(f"  {'task':<24} {'read':>9} {'written':>9} {'published':>9}")
            tasks = list(dict.fromkeys([*filter(None, self.published), *whole.read]))
            for task in tasks[:TASKS]:
                published = f"{self.published[task]:,}" if task in self.published and task else ""
                counts = f"{whole.read.get(task, 0):>9,} {whole.kept.get(task, 0):>9,} {published:>9}"
                lines.append(f"  {task or '(none)':<24} {counts}".rstrip())
            lines += [f"  and {len(tasks) - TASKS:,} other tasks"] * (len(tasks) > TASKS)
        if whole.not_chosen:
            first = list(whole.not_chosen.items())[:TASKS]
            named = ", ".join(f"{task or '(none)'} {count:,}" for task, count in first)
            named += ", ..." * (len(whole.not_chosen) > TASKS)
            lines.append(f"other tasks, not chosen: {sum(whole.not_chosen.values()):,} ({named})")
        lines.append(f"skipped: {len(whole.skipped):,}")
        for reason, rows in self.reasons.items():
            first = [": ".join(filter(None, (name or where, detail))) for where, name, detail in rows[:2]]
            more = "; ..." if len(rows) > len(first) else ""
            lines.append(f"  {len(rows):>6,}  {reason} ({'; '.join(first)}{more})")
        if whole.compared:
            share = 100 * (1 - whole.outside / whole.compared)
            lines.append(f"the mask covers at least half of the target's change in {share:.1f} % of {whole.compared:,}")
        return lines + [f"warning: {warning}" for warning in self.warnings]
