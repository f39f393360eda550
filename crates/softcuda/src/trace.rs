//! The call trace: JSON lines with begin and end, so that overlap can be seen. Owns the file, if there is one.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::time::Instant;

use serde::Serialize;

use crate::locks::lock;
use crate::races::Stamp;

/// Where calls and operations are written to.
#[derive(Debug)]
pub(crate) struct Trace {
    file: Option<Mutex<File>>,
    started: Instant,
}

#[derive(Serialize)]
struct Line<'a> {
    kind: &'static str,
    symbol: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<&'a str>,
    device: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u32>,
    begin_ns: u64,
    end_ns: u64,
}

impl Trace {
    /// Into that file, or nowhere; `%p` in its name is the process.
    pub(crate) fn new(path: Option<&str>) -> Result<Self, String> {
        let path = path.map(|path| path.replace("%p", &std::process::id().to_string()));
        let file = path
            .map(|path| File::create(&path).map_err(|error| format!("SOFTCUDA_TRACE: '{path}': {error}")))
            .transpose()?;
        Ok(Self { file: file.map(Mutex::new), started: Instant::now() })
    }

    fn since_start(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_nanos()).unwrap_or(u64::MAX)
    }

    fn write(&self, line: &Line<'_>) {
        let Some(file) = &self.file else { return };
        if let Ok(mut text) = serde_json::to_string(line) {
            text.push('\n');
            // A full disk ends the trace, not the program.
            drop(lock(file).write_all(text.as_bytes()));
        }
    }

    /// A call has returned.
    pub(crate) fn call(&self, symbol: &str, device: Option<usize>, began: Instant, code: u32) {
        if self.file.is_some() {
            self.write(&Line {
                kind: "call",
                symbol,
                kernel: None,
                device,
                stream: None,
                sequence: None,
                bytes: None,
                code: Some(code),
                begin_ns: self.since_start(began),
                end_ns: self.since_start(Instant::now()),
            });
        }
    }

    /// An operation is done.
    pub(crate) fn operation(&self, stamp: &Stamp, bytes: usize, began: Instant) {
        if self.file.is_some() {
            self.write(&Line {
                kind: "operation",
                symbol: stamp.symbol,
                kernel: stamp.detail.as_deref(),
                device: Some(stamp.device),
                stream: Some(stamp.stream),
                sequence: Some(stamp.sequence),
                bytes: Some(bytes),
                code: None,
                begin_ns: self.since_start(began),
                end_ns: self.since_start(Instant::now()),
            });
        }
    }
}
