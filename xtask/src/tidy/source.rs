//! How a file reads: its length and its functions', its docs, its names.

use syn::spanned::Spanned;
use syn::visit::Visit;

use super::{Finding, Source};

/// Lines of a file, tests included.
const FILE_LINES_MAX: usize = 600;
/// Lines of a function.
const FUNCTION_LINES_MAX: usize = 100;
/// Files that are longer for a while, with the length that they may not exceed: it only shrinks.
const RATCHET: &[(&str, usize)] = &[];
/// Names that say nothing.
const EMPTY_NAMES: &[&str] = &["utils", "util", "common", "helpers", "helper", "misc"];
/// Words that must not be in code; split so that this file passes its own check.
const BANNED: &[(&str, &str)] = &[
    (concat!("to", "do!("), "finish it"),
    (concat!("unimpl", "emented!("), "finish it"),
    (concat!("TO", "DO"), "do it, or open an issue"),
    (concat!("FIX", "ME"), "fix it, or open an issue"),
    (concat!("unbounded", "_channel"), "every queue has a bound"),
    (concat!("#[ign", "ore]"), "no test is skipped silently"),
];

pub(super) fn check(source: &Source) -> Vec<Finding> {
    let path = source.path.as_str();
    let mut findings = Vec::new();
    let lines = source.text.lines().count();
    let limit = RATCHET.iter().find(|(file, _)| *file == path).map_or(FILE_LINES_MAX, |(_, limit)| *limit);
    if lines > limit {
        findings
            .push(Finding::new(path, format!("has {lines} lines, may have {limit}: split it by subject")));
    }
    for (number, line) in source.text.lines().enumerate() {
        for (word, instead) in BANNED {
            if line.contains(word) {
                findings.push(Finding::new(format!("{path}:{}", number + 1), format!("'{word}': {instead}")));
            }
        }
        let code = line.split("//").next().unwrap_or_default();
        // A counting allocator cannot be written without; it is in no product.
        let allowed = ["crates/keepwarm-memory/", "crates/softcuda/", "xtask/", "benches/src/brain.rs"]
            .iter()
            .any(|place| path.starts_with(place));
        if !allowed
            && (code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl"))
        {
            findings.push(Finding::new(
                format!("{path}:{}", number + 1),
                "unsafe belongs in keepwarm-memory and softcuda alone",
            ));
        }
    }
    let stem = path.rsplit('/').next().and_then(|name| name.strip_suffix(".rs")).unwrap_or_default();
    if EMPTY_NAMES.contains(&stem) {
        findings.push(Finding::new(path, format!("'{stem}' names nothing: say what is in it")));
    }
    let file = match syn::parse_file(&source.text) {
        Ok(file) => file,
        Err(error) => return vec![Finding::new(path, format!("cannot be parsed: {error}"))],
    };
    if !source.is_test() && !file.attrs.iter().any(|attribute| attribute.path().is_ident("doc")) {
        findings.push(Finding::new(
            path,
            "has no module docs (//!): why it exists, what it owns, what it must not know",
        ));
    }
    let mut visitor = Visitor { path, test: source.is_test(), findings: Vec::new() };
    visitor.visit_file(&file);
    findings.extend(visitor.findings);
    findings
}

struct Visitor<'a> {
    path: &'a str,
    test: bool,
    findings: Vec<Finding>,
}

impl Visitor<'_> {
    fn length(&mut self, name: &syn::Ident, block: &syn::Block) {
        let span = block.span();
        let lines = span.end().line.saturating_sub(span.start().line) + 1;
        if lines > FUNCTION_LINES_MAX {
            let place = format!("{}:{}", self.path, name.span().start().line);
            self.findings.push(Finding::new(
                place,
                format!("{name} has {lines} lines, may have {FUNCTION_LINES_MAX}"),
            ));
        }
    }
}

impl<'ast> Visit<'ast> for Visitor<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.length(&item.sig.ident, &item.block);
        syn::visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.length(&item.sig.ident, &item.block);
        syn::visit::visit_impl_item_fn(self, item);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let name = item.ident.to_string();
        if EMPTY_NAMES.contains(&name.as_str()) {
            self.findings.push(Finding::new(self.path, format!("module '{name}' names nothing")));
        }
        let tests = item.attrs.iter().any(|attribute| attribute.path().is_ident("cfg"));
        let before = self.test;
        self.test |= tests;
        syn::visit::visit_item_mod(self, item);
        self.test = before;
    }

    fn visit_use_glob(&mut self, glob: &'ast syn::UseGlob) {
        if !self.test {
            let place = format!("{}:{}", self.path, glob.span().start().line);
            self.findings.push(Finding::new(place, "no glob imports outside tests"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(&Source { path: path.to_owned(), text: text.to_owned() })
            .into_iter()
            .map(|finding| finding.message)
            .collect()
    }

    #[test]
    fn a_good_file_passes() {
        assert!(
            found("crates/a/src/b.rs", "//! Docs.\nfn f() {}\n#[cfg(test)]\nmod tests { use super::*; }\n")
                .is_empty()
        );
    }

    #[test]
    fn each_rule_goes_red() {
        let red = |path: &str, text: &str, word: &str| {
            let found = found(path, text);
            assert!(found.iter().any(|message| message.contains(word)), "{word}: {found:?}");
        };
        red("crates/a/src/b.rs", "fn f() {}\n", "no module docs");
        red("crates/a/src/utils.rs", "//! Docs.\n", "names nothing");
        red("crates/a/src/b.rs", "//! Docs.\nuse std::fs::*;\n", "glob");
        red("crates/a/src/b.rs", "//! Docs.\nfn f() { unsafe { g() } }\n", "unsafe");
        red("crates/a/src/b.rs", &format!("//! Docs.\n// {}\n", BANNED[2].0), "open an issue");
        red("crates/a/src/b.rs", &format!("//! Docs.\n{}", "// line\n".repeat(600)), "split it");
        red(
            "crates/a/src/b.rs",
            &format!("//! Docs.\nfn f() {{\n{}}}\n", "g();\n".repeat(100)),
            "may have 100",
        );
        red("crates/a/src/b.rs", "//! Docs.\nfn (", "cannot be parsed");
    }
}
