//! Faults on order: which calls fail, how, and when. Decides; whoever asks carries it out.
//!
//! Grammar: rules separated by `;` or newlines, each `SYMBOL ACTION [VALUE] [after=N] [times=N] [device=N]`.

use std::time::Duration;

use crate::error::Code;
use crate::operation::Effects;
use crate::symbols;

/// Rules that may be in force at once.
pub(crate) const RULES_MAX: usize = 256;
/// A delay beyond an hour is a hang, and has its own word.
const DELAY_MAX_MS: u64 = 3_600_000;
const USAGE: &str = "use 'SYMBOL fail|sticky|async|async-sticky CODE', 'SYMBOL delay MS', 'SYMBOL corrupt [BIT]', \
                     each with [after=N] [times=N, 0 is for ever] [device=N]; or 'hang', 'resume', 'lose [CODE]' with \
                     [device=N]; or 'clear'";

/// What one order asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    Rule(Rule),
    Hang(Option<usize>),
    Resume(Option<usize>),
    Lose(Option<usize>, Code),
    Clear,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Fail(Code),
    Sticky(Code),
    Async(Code, bool),
    Delay(u64),
    Corrupt(u64),
}

/// A fault that waits for its calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    /// `None` is any.
    symbol: Option<&'static str>,
    action: Action,
    after: u64,
    /// 0 is for ever.
    times: u64,
    device: Option<usize>,
}

/// What becomes of one call.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// The call answers this, and whether its context is sick from then on.
    pub(crate) refuse: Option<(Code, bool)>,
    pub(crate) effects: Effects,
}

/// The rules in force.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    rules: Vec<Rule>,
    /// Orders that were carried out so far.
    pub(crate) injected: u64,
}

impl Faults {
    /// Adds a rule.
    pub(crate) fn add(&mut self, rule: Rule) -> Result<(), String> {
        if self.rules.len() >= RULES_MAX {
            return Err(format!("{RULES_MAX} fault rules are in force already; send 'clear' first"));
        }
        self.rules.push(rule);
        Ok(())
    }

    pub(crate) fn clear(&mut self) {
        self.rules.clear();
    }

    /// Judges a call.
    pub(crate) fn judge(&mut self, symbol: &str, device: Option<usize>) -> Verdict {
        let mut verdict = Verdict::default();
        let mut spent = Vec::new();
        for (index, rule) in self.rules.iter_mut().enumerate() {
            let other = rule.symbol.is_some_and(|name| name != symbol)
                || rule.device.is_some_and(|number| device != Some(number));
            if other {
                continue;
            }
            if rule.after > 0 {
                rule.after -= 1;
                continue;
            }
            self.injected += 1;
            match rule.action {
                Action::Fail(code) => verdict.refuse = Some((code, false)),
                Action::Sticky(code) => verdict.refuse = Some((code, true)),
                Action::Async(code, sticky) => verdict.effects.fail = Some((code, sticky)),
                Action::Delay(ms) => verdict.effects.delay = Some(Duration::from_millis(ms)),
                Action::Corrupt(bit) => verdict.effects.corrupt = Some(bit),
            }
            if rule.times > 0 {
                rule.times -= 1;
                if rule.times == 0 {
                    spent.push(index);
                }
            }
        }
        for index in spent.into_iter().rev() {
            self.rules.remove(index);
        }
        verdict
    }
}

/// Reads orders.
pub(crate) fn parse(text: &str) -> Result<Vec<Order>, String> {
    text.split([';', '\n'])
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(|line| order(line).map_err(|why| format!("fault '{line}': {why}; {USAGE}")))
        .collect()
}

fn order(line: &str) -> Result<Order, String> {
    let (mut words, mut after, mut times, mut device) = (Vec::new(), 0, 1, None);
    for word in line.split_whitespace() {
        match word.split_once('=') {
            None => words.push(word),
            Some(("after", value)) => after = number(value)?,
            Some(("times", value)) => times = number(value)?,
            Some(("device", value)) => device = usize::try_from(number(value)?).ok(),
            Some((key, _)) => return Err(format!("'{key}' is not known")),
        }
    }
    let code = |word: Option<&&str>| -> Result<Code, String> {
        let value = number(word.ok_or("a result code is missing")?)?;
        match u32::try_from(value) {
            Ok(code @ 1..) => Ok(Code(code)),
            _ => Err(format!("{value} is not the code of an error")),
        }
    };
    let special = match words.first() {
        Some(&"hang") => Some(Order::Hang(device)),
        Some(&"resume") => Some(Order::Resume(device)),
        Some(&"clear") => Some(Order::Clear),
        Some(&"lose") if words.len() == 1 => Some(Order::Lose(device, Code::UNKNOWN)),
        Some(&"lose") => return Ok(Order::Lose(device, code(words.get(1))?)),
        _ => None,
    };
    if let Some(order) = special {
        return if words.len() == 1 { Ok(order) } else { Err(format!("'{}' takes nothing more", words[0])) };
    }
    let symbol = match words.first().copied() {
        Some("*") => None,
        Some(name) => Some(
            symbols::ALL
                .iter()
                .copied()
                .find(|known| *known == name)
                .ok_or_else(|| format!("'{name}' is no symbol of this library"))?,
        ),
        None => return Err("a symbol is missing".to_owned()),
    };
    let action = match words.get(1).copied() {
        Some("fail") => Action::Fail(code(words.get(2))?),
        Some("sticky") => Action::Sticky(code(words.get(2))?),
        Some("async") => Action::Async(code(words.get(2))?, false),
        Some("async-sticky") => Action::Async(code(words.get(2))?, true),
        Some("delay") => match number(words.get(2).ok_or("milliseconds are missing")?)? {
            ms @ 0..=DELAY_MAX_MS => Action::Delay(ms),
            ms => return Err(format!("{ms} ms are more than {DELAY_MAX_MS}")),
        },
        Some("corrupt") if symbol.is_some_and(|name| !name.starts_with("cuMemcpy")) => {
            return Err("only copies (cuMemcpy...) can be corrupted".to_owned());
        }
        Some("corrupt") => Action::Corrupt(words.get(2).map_or(Ok(0), |word| number(word))?),
        Some(other) => return Err(format!("'{other}' is no action")),
        None => return Err("an action is missing".to_owned()),
    };
    if words.len() > 3 {
        return Err(format!("'{}' is too much", words[3]));
    }
    Ok(Order::Rule(Rule { symbol, action, after, times, device }))
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("'{word}' is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(text: &str) -> Faults {
        let mut faults = Faults::default();
        for order in parse(text).unwrap() {
            let Order::Rule(rule) = order else { panic!("{order:?}") };
            faults.add(rule).unwrap();
        }
        faults
    }

    #[test]
    fn a_rule_counts_its_own_calls_only() {
        let mut faults = faults("cuMemAllocAsync fail 2 after=1 times=2 device=1; * delay 5 times=0");
        let mut refused = |symbol, device| faults.judge(symbol, Some(device)).refuse.is_some();
        assert!(!refused("cuMemAllocAsync", 0) && !refused("cuStreamCreate", 1));
        assert!(!refused("cuMemAllocAsync", 1), "the first is let through");
        assert!(refused("cuMemAllocAsync", 1) && refused("cuMemAllocAsync", 1));
        assert!(!refused("cuMemAllocAsync", 1), "and the rule is spent");
        assert_eq!(faults.judge("cuInit", None).effects.delay, Some(Duration::from_millis(5)));
    }

    #[test]
    fn orders_are_read_and_nonsense_is_refused() {
        assert_eq!(parse("hang device=1; lose 46; clear").unwrap().len(), 3);
        for (text, word) in [
            ("cuNothing fail 2", "no symbol"),
            ("cuInit", "action is missing"),
            ("cuInit break", "no action"),
            ("cuInit fail", "code is missing"),
            ("cuInit fail 0", "not the code"),
            ("cuInit fail x", "not a number"),
            ("cuInit fail 2 3", "too much"),
            ("cuInit fail 2 soon=1", "'soon'"),
            ("cuInit delay 99999999", "more than"),
            ("cuMemsetD8Async corrupt 1", "only copies"),
            ("hang now", "nothing more"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(word) && error.contains(text), "{text}: {error}");
        }
        let rule = "cuInit fail 2 times=0; ".repeat(RULES_MAX + 1);
        let mut faults = Faults::default();
        let added = parse(&rule).unwrap().into_iter().map(|order| match order {
            Order::Rule(rule) => faults.add(rule),
            _ => Ok(()),
        });
        assert_eq!(added.filter(Result::is_err).count(), 1);
    }
}
