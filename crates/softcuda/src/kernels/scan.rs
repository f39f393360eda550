//! Finds the kernels of a preprocessed source and rewrites the two words that C++ does not have: `__global__` and
//! `__shared__`. Knows text only.

/// A source that C++ understands.
#[derive(Debug)]
pub(super) struct Scanned {
    pub(super) text: String,
    pub(super) kernels: Vec<String>,
}

/// Why a source cannot be run, and where.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) file: String,
    pub(super) line: usize,
    pub(super) why: String,
}

/// What a brace opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    ExternC,
    Other,
}

/// Rewrites a source and appends a description of each kernel.
pub(super) fn scan(source: &str) -> Result<Scanned, Refused> {
    let masked = mask(source);
    let mut scan = Scan { source, masked: &masked, out: String::new(), copied: 0, kernels: Vec::new() };
    scan.go()?;
    let Scan { mut out, copied, kernels, .. } = scan;
    out.push_str(&source[copied..]);
    for name in &kernels {
        out.push_str(&format!(
            "\nextern \"C\" {{ __attribute__((visibility(\"default\"))) extern const softcuda_kernel \
             softcuda_kernel_{name}; const softcuda_kernel softcuda_kernel_{name} = \
             softcuda::Kernel<&{name}>::describe(\"{name}\"); }}\n"
        ));
    }
    Ok(Scanned { text: out, kernels })
}

/// The source with the inside of literals and the preprocessor's lines blanked, so that offsets stay. `"C"` stays too.
fn mask(source: &str) -> Vec<u8> {
    let mut masked = source.as_bytes().to_vec();
    let mut start = 0;
    for line in source.split_inclusive('\n') {
        let bytes = &mut masked[start..start + line.len()];
        start += line.len();
        if line.trim_start().starts_with('#') {
            bytes.fill(b' ');
            continue;
        }
        let mut at = 0;
        while at < bytes.len() {
            let quote = bytes[at];
            let literal = quote == b'"' || (quote == b'\'' && !separates_digits(bytes, at));
            if !literal || bytes[at..].starts_with(b"\"C\"") {
                at += if literal { 3 } else { 1 };
                continue;
            }
            at += 1;
            while at < bytes.len() && bytes[at] != quote {
                let escaped = bytes[at] == b'\\';
                bytes[at] = b' ';
                if escaped && at + 1 < bytes.len() {
                    bytes[at + 1] = b' ';
                    at += 1;
                }
                at += 1;
            }
            at += 1;
        }
    }
    masked
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Whether a quote stands in a number, as in `1'000`.
fn separates_digits(bytes: &[u8], at: usize) -> bool {
    let word = bytes[..at].iter().rev().take_while(|byte| is_word(**byte) || **byte == b'\'').count();
    word > 0 && bytes[at - word].is_ascii_digit()
}

struct Scan<'a> {
    source: &'a str,
    masked: &'a [u8],
    out: String,
    /// How much of the source is in `out`.
    copied: usize,
    kernels: Vec<String>,
}

impl Scan<'_> {
    fn go(&mut self) -> Result<(), Refused> {
        let (mut scopes, mut statement, mut at) = (Vec::new(), 0, 0);
        while at < self.masked.len() {
            match self.masked[at] {
                b'{' => {
                    let words = self.words(statement, at);
                    let is_c = words.ends_with(&["extern", "\"C\""]);
                    scopes.push(if is_c { Scope::ExternC } else { Scope::Other });
                    statement = at + 1;
                }
                b'}' => {
                    scopes.pop();
                    statement = at + 1;
                }
                b';' => statement = at + 1,
                byte if is_word(byte) => {
                    let length = self.masked[at..].iter().take_while(|byte| is_word(**byte)).count();
                    at = match &self.masked[at..at + length] {
                        b"__global__" => self.kernel(&scopes, statement, at)?,
                        b"__shared__" => self.shared(&scopes, statement, at)?,
                        _ => at + length,
                    };
                    continue;
                }
                _ => {}
            }
            at += 1;
        }
        Ok(())
    }

    /// Words between two places; `"C"` is one of them.
    fn words(&self, from: usize, to: usize) -> Vec<&str> {
        self.source[from..to]
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'))
            .flat_map(|line| line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '"')))
            .filter(|word| !word.is_empty())
            .collect()
    }

    fn replace(&mut self, from: usize, to: usize, with: &str) {
        self.out.push_str(&self.source[self.copied..from]);
        self.out.push_str(with);
        // The lines stay as many as they were, so that the compiler's messages name the right ones.
        let lines = self.source[from..to].matches('\n').count();
        self.out.push_str(&"\n".repeat(lines));
        self.copied = to;
    }

    fn find(&self, from: usize, wanted: &[u8]) -> Option<usize> {
        self.masked[from..].iter().position(|byte| wanted.contains(byte)).map(|at| from + at)
    }

    fn kernel(&mut self, scopes: &[Scope], statement: usize, at: usize) -> Result<usize, Refused> {
        let after = at + b"__global__".len();
        let open = self.find(after, b"(;{").filter(|open| self.masked[*open] == b'(');
        let Some(open) = open else {
            return Err(self.refuse(at, "'__global__' without a function".to_owned()));
        };
        let name = self.words(after, open).last().copied().unwrap_or_default().to_owned();
        let words = self.words(statement, open);
        if words.contains(&"template") {
            return Err(
                self.refuse(at, format!("kernel '{name}' is a template: write a function for each type"))
            );
        }
        if scopes.contains(&Scope::Other) {
            return Err(self.refuse(at, format!("kernel '{name}' is not at file scope: move it there")));
        }
        if scopes.is_empty() && !words.contains(&"\"C\"") {
            return Err(
                self.refuse(at, format!("kernel '{name}' is not extern \"C\": its name in PTX would differ"))
            );
        }
        let mut depth = 0_usize;
        let close = (open..self.masked.len()).find(|at| {
            match self.masked[*at] {
                b'(' => depth += 1,
                b')' => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        let next = close.and_then(|close| self.find(close, b"{;"));
        if next.is_some_and(|next| self.masked[next] == b'{') && !self.kernels.contains(&name) {
            self.kernels.push(name);
        }
        self.replace(at, after, "");
        Ok(after)
    }

    fn shared(&mut self, scopes: &[Scope], statement: usize, at: usize) -> Result<usize, Refused> {
        let after = at + b"__shared__".len();
        let words = self.words(statement, at);
        if !words.contains(&"extern") {
            let with = if words.contains(&"static") { "thread_local" } else { "static thread_local" };
            self.replace(at, after, with);
            return Ok(after);
        }
        let end = self.find(after, b";").unwrap_or(self.masked.len());
        let bracket = self.find(after, b"[").filter(|bracket| *bracket < end);
        let Some(bracket) = bracket else {
            return Err(self.refuse(at, "'extern __shared__' is not an array: write TYPE NAME[]".to_owned()));
        };
        if !scopes.contains(&Scope::Other) {
            let why = "'extern __shared__' at file scope: declare it inside the kernel".to_owned();
            return Err(self.refuse(at, why));
        }
        let declared = self.source[after..bracket].trim();
        // Its alignment is that of the whole buffer, which is enough for any type.
        let declared = match declared.strip_prefix("alignas") {
            Some(rest) => rest.split_once(')').map_or(rest, |(_, rest)| rest).trim(),
            None => declared,
        };
        let length = declared.bytes().rev().take_while(|byte| is_word(*byte)).count();
        let (kind, name) = declared.split_at(declared.len() - length);
        let first = statement
            + self.masked[statement..at].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        let with = format!("{kind} *const {name} = static_cast<{kind} *>(softcuda::dynamic_shared())");
        self.replace(first, end, &with);
        Ok(end)
    }

    fn refuse(&self, at: usize, why: String) -> Refused {
        let (mut file, mut line) = ("source".to_owned(), 0);
        for text in self.source[..at].split('\n') {
            let mut marker = text.strip_prefix("# ").unwrap_or_default().splitn(2, ' ');
            match (marker.next().and_then(|number| number.parse::<usize>().ok()), marker.next()) {
                (Some(number), Some(name)) => {
                    line = number.saturating_sub(1);
                    name.split('"').nth(1).unwrap_or_default().clone_into(&mut file);
                }
                _ => line += 1,
            }
        }
        Refused { file, line, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernels(source: &str) -> Vec<String> {
        scan(source).map(|scanned| scanned.kernels).unwrap_or_default()
    }

    #[test]
    fn kernels_are_found_however_they_are_written() {
        assert_eq!(kernels("extern \"C\" __global__ void a(int *x) { }"), ["a"]);
        assert_eq!(
            kernels("extern \"C\" {\n__global__ void a();\n__global__\nvoid b(int (*f)[2]) {}\n}"),
            ["b"]
        );
        assert_eq!(
            kernels("const char *t = \"__global__ void no() {\"; extern \"C\" __global__ void c() {}"),
            ["c"]
        );
        assert_eq!(kernels("int n = 1'000; char q = '\"'; extern \"C\" __global__ void d() {}"), ["d"]);
        assert_eq!(kernels("extern \"C\" __global__ void e(); extern \"C\" __global__ void e() {}"), ["e"]);
    }

    #[test]
    fn shared_memory_becomes_a_threads_own() {
        let text = |source: &str| scan(source).map(|scanned| scanned.text).unwrap_or_default();
        assert_eq!(text("__shared__ int x[4];"), "static thread_local int x[4];");
        assert_eq!(text("static __shared__ int x;"), "static thread_local int x;");
        assert_eq!(
            text("void f() { extern __shared__ alignas(16) unsigned char bytes[]; }"),
            "void f() { unsigned char  *const bytes = static_cast<unsigned char  *>(softcuda::dynamic_shared()); }"
        );
    }

    #[test]
    fn what_cannot_run_is_refused_with_its_place() {
        for (source, word) in [
            ("__global__ void a() {}", "not extern \"C\""),
            ("template <class T> __global__ void a(T x) {}", "template"),
            ("namespace n { extern \"C\" __global__ void a() {} }", "file scope"),
            ("extern __shared__ int x[];", "inside the kernel"),
            ("void f() { extern __shared__ int x; }", "not an array"),
            ("__global__;", "without a function"),
        ] {
            let refused = scan(&format!("# 7 \"some.cu\" 2\n\n{source}")).unwrap_err();
            assert!(refused.why.contains(word), "{source}: {refused:?}");
            assert_eq!((refused.file.as_str(), refused.line), ("some.cu", 8));
        }
    }
}
