//! A TOML table while it is read: typed look-ups that note what is wrong and go on.

use std::cell::RefCell;
use std::fmt::Display;
use std::ops::Range;
use std::str::FromStr;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::ConfigError;

/// Names this far apart are still taken for a slip of the finger.
const SIMILAR: f64 = 0.7;

/// Where errors are noted.
pub(crate) struct Notes<'t> {
    text: &'t str,
    errors: RefCell<Vec<ConfigError>>,
}

impl<'t> Notes<'t> {
    pub(crate) const fn new(text: &'t str) -> Self {
        Self { text, errors: RefCell::new(Vec::new()) }
    }

    pub(crate) fn note(&self, span: Range<usize>, key: impl Into<String>, reason: impl Into<String>) {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1;
        self.errors.borrow_mut().push(ConfigError { line, column, key: key.into(), reason: reason.into() });
    }

    pub(crate) fn into_errors(self) -> Vec<ConfigError> {
        let mut errors = self.errors.into_inner();
        errors.sort_by_key(|error| (error.line, error.column));
        errors
    }

    pub(crate) fn any(&self) -> bool {
        !self.errors.borrow().is_empty()
    }
}

/// A table, with its path and its notes.
#[derive(Clone)]
pub(crate) struct Section<'a, 't> {
    pub(crate) notes: &'a Notes<'t>,
    table: &'a DeTable<'t>,
    span: Range<usize>,
    path: String,
}

/// The known name nearest to what was written.
pub(crate) fn nearest<'k>(written: &str, known: &[&'k str]) -> Option<&'k str> {
    let scored = known.iter().map(|name| (strsim::jaro_winkler(written, name), *name));
    scored.filter(|(score, _)| *score >= SIMILAR).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}

impl<'a, 't> Section<'a, 't> {
    pub(crate) const fn root(notes: &'a Notes<'t>, table: &'a DeTable<'t>) -> Self {
        Self { notes, table, span: 0..0, path: String::new() }
    }

    pub(crate) fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Notes every key that is not among `known`.
    pub(crate) fn only(&self, known: &[&str]) {
        for (key, _) in self.table {
            let written: &str = key.get_ref();
            if known.contains(&written) {
                continue;
            }
            let hint = match nearest(written, known) {
                Some(name) => format!("did you mean '{name}'?"),
                None => format!("known here: {}", known.join(", ")),
            };
            self.notes.note(key.span(), self.path(written), format!("unknown key; {hint}"));
        }
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    pub(crate) fn span(&self, key: &str) -> Range<usize> {
        self.table.get(key).map_or_else(|| self.span.clone(), Spanned::span)
    }

    pub(crate) fn bad(&self, key: &str, reason: impl Into<String>) {
        self.notes.note(self.span(key), self.path(key), reason);
    }

    fn wrong_type(&self, key: &str, value: &DeValue<'_>, wanted: &str) {
        self.bad(key, format!("is a {}, must be {wanted}", value.type_str()));
    }

    pub(crate) fn missing(&self, key: &str) {
        self.notes.note(self.span.clone(), self.path(key), "is missing");
    }

    fn value(&self, key: &str) -> Option<&'a DeValue<'t>> {
        self.table.get(key).map(|value| value.get_ref())
    }

    pub(crate) fn string(&self, key: &str) -> Option<&'a str> {
        let value = self.value(key)?;
        let text = value.as_str();
        if text.is_none() {
            self.wrong_type(key, value, "a string");
        }
        text
    }

    /// A string that parses as `T`.
    pub(crate) fn parsed<T: FromStr<Err: Display>>(&self, key: &str) -> Option<T> {
        let text = self.string(key)?;
        text.parse().map_err(|error: T::Err| self.bad(key, error.to_string())).ok()
    }

    /// A string that parses as `T`, with no note where it is none.
    pub(crate) fn quiet<T: FromStr>(&self, key: &str) -> Option<T> {
        self.value(key)?.as_str()?.parse().ok()
    }

    /// One of a few words.
    pub(crate) fn word(&self, key: &str, words: &[&str]) -> Option<usize> {
        let text = self.string(key)?;
        let found = words.iter().position(|word| *word == text);
        if found.is_none() {
            let hint =
                nearest(text, words).map(|word| format!("; did you mean '{word}'?")).unwrap_or_default();
            self.bad(key, format!("'{text}' is none of {}{hint}", words.join(", ")));
        }
        found
    }

    pub(crate) fn number(&self, key: &str, range: Range<u64>) -> Option<u64> {
        let value = self.value(key)?;
        let Some(integer) = value.as_integer() else {
            self.wrong_type(key, value, "a whole number");
            return None;
        };
        match u64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(number) if range.contains(&number) => Some(number),
            _ => {
                self.bad(
                    key,
                    format!("{} is out of range: {} to {}", integer.as_str(), range.start, range.end - 1),
                );
                None
            }
        }
    }

    /// A share from 0 to 1.
    pub(crate) fn share(&self, key: &str) -> Option<f64> {
        let value = self.value(key)?;
        let text = value
            .as_float()
            .map(|float| float.as_str())
            .or_else(|| value.as_integer().map(|integer| integer.as_str()));
        let Some(text) = text else {
            self.wrong_type(key, value, "a number from 0 to 1");
            return None;
        };
        match text.parse::<f64>() {
            Ok(share) if share > 0.0 && share <= 1.0 => Some(share),
            _ => {
                self.bad(key, format!("{text} is out of range: above 0, up to 1"));
                None
            }
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Option<bool> {
        let value = self.value(key)?;
        let flag = value.as_bool();
        if flag.is_none() {
            self.wrong_type(key, value, "true or false");
        }
        flag
    }

    /// A list of strings that parse as `T`.
    pub(crate) fn list<T: FromStr<Err: Display>>(&self, key: &str) -> Option<Vec<T>> {
        let value = self.value(key)?;
        let Some(array) = value.as_array() else {
            self.wrong_type(key, value, "a list of strings");
            return None;
        };
        let mut items = Vec::new();
        for (index, item) in array.iter().enumerate() {
            let path = format!("{}[{index}]", self.path(key));
            match item.get_ref().as_str().map(str::parse) {
                Some(Ok(value)) => items.push(value),
                Some(Err(error)) => self.notes.note(item.span(), path, T::Err::to_string(&error)),
                None => self.notes.note(item.span(), path, "must be a string"),
            }
        }
        (items.len() == array.len()).then_some(items)
    }

    pub(crate) fn section(&self, key: &str) -> Option<Section<'a, 't>> {
        let value = self.table.get(key)?;
        let Some(table) = value.get_ref().as_table() else {
            self.wrong_type(key, value.get_ref(), "a table");
            return None;
        };
        Some(Section { notes: self.notes, table, span: value.span(), path: self.path(key) })
    }

    pub(crate) fn sections(&self, key: &str) -> Vec<Section<'a, 't>> {
        let Some(value) = self.table.get(key) else { return Vec::new() };
        let Some(array) = value.get_ref().as_array() else {
            self.bad(
                key,
                format!("is a {}, must be written as [[{}]]", value.get_ref().type_str(), self.path(key)),
            );
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (index, item) in array.iter().enumerate() {
            let path = format!("{}[{index}]", self.path(key));
            match item.get_ref().as_table() {
                Some(table) => sections.push(Section { notes: self.notes, table, span: item.span(), path }),
                None => self.notes.note(item.span(), path, "must be a table"),
            }
        }
        sections
    }
}
