//! The table at the end of the demo.

use keepwarm_types::{Bytes, Source};
use serde::Serialize;

use super::act::Takeover;
use super::checks::{Check, Recomputed, Restores};
use super::figures::{BreakEven, median};
use super::play::Turn;
use crate::output::{Table, millis};

/// Turns by where their state was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Sources {
    pub(crate) turns: usize,
    pub(crate) from_hbm: usize,
    pub(crate) from_pinned: usize,
    pub(crate) from_peer: usize,
    pub(crate) cold: usize,
    pub(crate) uncached: usize,
}

impl Sources {
    fn of(turns: &[Turn]) -> Self {
        let from = |source| turns.iter().filter(|turn| turn.source == source).count();
        Self {
            turns: turns.len(),
            from_hbm: from(Source::Hbm),
            from_pinned: from(Source::Pinned),
            from_peer: from(Source::Peer),
            cold: from(Source::None),
            uncached: turns.iter().filter(|turn| turn.uncached).count(),
        }
    }
}

/// Time to first token, kept and recomputed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct FirstToken {
    pub(crate) kept_ms: f64,
    pub(crate) kept_turns: usize,
    pub(crate) recomputed_ms: f64,
    pub(crate) recomputed_turns: usize,
    pub(crate) ratio: f64,
    pub(crate) prefill_tokens_per_s: f64,
}

impl FirstToken {
    fn of(turns: &[Turn], recomputed: &[Recomputed]) -> Option<Self> {
        let kept = turns.iter().filter(|turn| turn.source != Source::None && !turn.uncached);
        let kept: Vec<_> = kept.map(|turn| turn.ttft_ms).collect();
        let (kept_ms, recomputed_ms) =
            (median(kept.iter().copied())?, median(recomputed.iter().map(|one| one.ttft_ms))?);
        let rate = |one: &Recomputed| one.tokens as f64 / (one.ttft_ms / 1000.0);
        Some(Self {
            kept_ms,
            kept_turns: kept.len(),
            recomputed_ms,
            recomputed_turns: recomputed.len(),
            ratio: recomputed_ms / kept_ms,
            prefill_tokens_per_s: median(recomputed.iter().map(rate))?,
        })
    }
}

/// All that the demo found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// Says so where its weights are random.
    pub(crate) model: String,
    pub(crate) conversations: usize,
    pub(crate) sources: Sources,
    pub(crate) first_token: Option<FirstToken>,
    pub(crate) restores: Option<Restores>,
    pub(crate) takeovers: Vec<Takeover>,
    pub(crate) break_even: Vec<BreakEven>,
    pub(crate) checks: Vec<Check>,
    pub(crate) seconds: f64,
}

impl Report {
    pub(crate) fn new(
        model: String,
        kv_bytes_per_token: u64,
        turns: &[Turn],
        recomputed: &[Recomputed],
        restores: Option<Restores>,
        checks: Vec<Check>,
    ) -> Self {
        let first_token = FirstToken::of(turns, recomputed);
        let engine = first_token.map(|first| {
            BreakEven::new(
                format!("this engine, {model}"),
                kv_bytes_per_token,
                first.prefill_tokens_per_s,
                "both measured here",
            )
        });
        let conversations = turns.iter().map(|turn| turn.conversation + 1).max().unwrap_or(0);
        Self {
            model,
            conversations,
            sources: Sources::of(turns),
            first_token,
            restores,
            takeovers: Vec::new(),
            break_even: engine.into_iter().chain([BreakEven::eight_billion()]).collect(),
            checks,
            seconds: 0.0,
        }
    }

    pub(crate) fn failed(&self) -> usize {
        self.checks.iter().filter(|check| !check.passed).count()
    }

    pub(crate) fn text(&self) -> String {
        let mut table = Table::default();
        let mut line = |name: &str, value: String| table.row([name.to_owned(), value]);
        let sources = self.sources;
        line("model", self.model.clone());
        line(
            "turns",
            format!("{} in {} conversations, {:.0} s", sources.turns, self.conversations, self.seconds),
        );
        let uncached =
            if sources.uncached > 0 { format!(", {} ran uncached", sources.uncached) } else { String::new() };
        line(
            "state came from",
            format!(
                "HBM {} times, pinned memory {} times, a peer {} times, nowhere (cold start) {} times{uncached}",
                sources.from_hbm, sources.from_pinned, sources.from_peer, sources.cold
            ),
        );
        if let Some(first) = &self.first_token {
            line("first token, kept", format!("{} (median of {})", millis(first.kept_ms), first.kept_turns));
            let recomputed = format!(
                "{} (median of {}; {:.0} tokens/s)",
                millis(first.recomputed_ms),
                first.recomputed_turns,
                first.prefill_tokens_per_s
            );
            line("first token, recomputed", recomputed);
            line("ratio", format!("{:.0}x", first.ratio));
        }
        match &self.restores {
            Some(restores) => line(
                "restore from pinned",
                format!(
                    "{:.1} GB/s, memcpy of the same {} {:.1} GB/s: {:.2}x (medians of {})",
                    restores.gb_per_s,
                    Bytes(restores.median_bytes),
                    restores.memcpy_gb_per_s,
                    restores.ratio,
                    restores.count
                ),
            ),
            None => line("restore from pinned", "not measured: nothing was moved".to_owned()),
        }
        for takeover in &self.takeovers {
            let Takeover { node, conversations, first_answer_ms, refilled_s } = takeover;
            line(
                "take-over",
                format!(
                    "{node} killed, owner of {conversations} conversations: first answer of a survivor after {first_answer_ms:.0} ms; \
                     back and filled {refilled_s:.1} s after its start"
                ),
            );
        }
        for even in &self.break_even {
            line(
                "break-even",
                format!(
                    "{:.3} GB/s for {}: {} B/token x {:.0} tokens/s ({})",
                    even.gb_per_s,
                    even.subject,
                    even.kv_bytes_per_token,
                    even.prefill_tokens_per_s,
                    even.basis
                ),
            );
        }
        for check in &self.checks {
            let verdict = if check.passed { "ok" } else { "FAILED" };
            line(&format!("check: {verdict}"), format!("{}: {}", check.what, check.detail));
        }
        table.render()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(source: Source, ttft_ms: f64) -> Turn {
        Turn {
            conversation: 0,
            source,
            ttft_ms,
            cached_tokens: 900,
            uncached: false,
            text: String::new(),
            tokens: Vec::new(),
        }
    }

    #[test]
    fn the_report_counts_sources_and_divides_medians() {
        let turns = [
            turn(Source::None, 3000.0),
            turn(Source::Hbm, 10.0),
            turn(Source::Pinned, 30.0),
            turn(Source::Pinned, 20.0),
        ];
        let recomputed = [Recomputed { ttft_ms: 2000.0, tokens: 1000 }];
        let checks = vec![Check::new("a", true, "x"), Check::new("b", false, "y")];
        let report = Report::new("m (random weights)".to_owned(), 23_040, &turns, &recomputed, None, checks);
        assert_eq!(
            report.sources,
            Sources { turns: 4, from_hbm: 1, from_pinned: 2, from_peer: 0, cold: 1, uncached: 0 }
        );
        let first = report.first_token.unwrap();
        assert_eq!((first.kept_ms, first.ratio, first.prefill_tokens_per_s), (20.0, 100.0, 500.0));
        assert_eq!(report.failed(), 1);
        let text = report.text();
        for part in ["random weights", "100x", "0.012 GB/s", "1.311 GB/s", "check: FAILED", "not measured"] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn without_warm_turns_there_is_no_ratio() {
        let report = Report::new("m".to_owned(), 1, &[turn(Source::None, 5.0)], &[], None, Vec::new());
        assert_eq!(report.first_token, None);
        assert!(!report.text().contains("ratio"));
    }
}
