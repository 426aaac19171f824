"""What became of the data, in numbers and in words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Counts of one dataset. Tokens and lengths are of the rows kept."""

    rows: int  # rows read
    kept: int  # rows to train on
    dropped_too_long: int
    seq_length: int  # the limit that decided it, in tokens
    tokens: int
    label_tokens: int  # next-token targets among them
    longest: int  # tokens
    layout: str = ""  # how rows share lines, once the plan has fixed it

    def lines(self) -> list[str]:
        """For people: one line."""
        parts = [f"data: {self.rows:,} {'row' if self.rows == 1 else 'rows'}"]
        if self.dropped_too_long:
            parts.append(f"{self.dropped_too_long:,} dropped (longer than seq_length {self.seq_length})")
        share = round(100 * self.label_tokens / max(self.tokens, 1))
        parts += [f"{self.tokens:,} tokens", f"{share}% of them labels", f"longest {self.longest:,}"]
        if self.layout:
            parts.append(self.layout)
        return [", ".join(parts)]
