//! Server-sent events, as far as a streamed answer needs them: `data` fields, events ended by an empty line.
//!
//! Source: WHATWG HTML, "Server-sent events", 9.2.6 (parsing). Lines end with LF, CR LF or CR; a chunk of the
//! connection may end anywhere, also within a character.

/// Longest event; an answer's last event carries its usage and headers, well under a kilobyte, and its
/// other events some tokens. A server that sends more without an end is not one of ours.
pub(crate) const EVENT_BYTES_MAX: usize = 1 << 20;

/// Takes bytes, gives the data of whole events.
#[derive(Debug, Default)]
pub(crate) struct SseParser {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    after_cr: bool,
}

/// An event grew beyond [`EVENT_BYTES_MAX`], or is not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SseError {
    TooLong,
    NotUtf8,
}

impl SseParser {
    /// Takes the next bytes and returns the events that they complete.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, SseError> {
        let mut events = Vec::new();
        for &byte in bytes {
            let line_feed_of_pair = byte == b'\n' && std::mem::take(&mut self.after_cr);
            if line_feed_of_pair {
                continue;
            }
            self.after_cr = byte == b'\r';
            if matches!(byte, b'\n' | b'\r') {
                if let Some(event) = self.end_line()? {
                    events.push(event);
                }
            } else {
                self.line.push(byte);
                if self.line.len() + self.data.len() > EVENT_BYTES_MAX {
                    return Err(SseError::TooLong);
                }
            }
        }
        Ok(events)
    }

    fn end_line(&mut self) -> Result<Option<String>, SseError> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            if !std::mem::take(&mut self.has_data) {
                return Ok(None);
            }
            return String::from_utf8(data).map(Some).map_err(|_| SseError::NotUtf8);
        }
        let (field, value) = match line.iter().position(|byte| *byte == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (&line[..], &[][..]),
        };
        if field == b"data" {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.has_data = true;
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str =
        ": hello\n\ndata: one\n\nevent: x\r\nid: 4\r\ndata:two\r\ndata:  lines\r\n\r\ndata: é\r\rdata\n\n";

    fn events(chunk: usize) -> Vec<String> {
        let mut parser = SseParser::default();
        STREAM.as_bytes().chunks(chunk).flat_map(|bytes| parser.push(bytes).unwrap()).collect()
    }

    #[test]
    fn events_are_the_same_however_the_bytes_arrive() {
        let whole = events(STREAM.len());
        assert_eq!(whole, ["one", "two\n lines", "é", ""]);
        for chunk in 1..STREAM.len() {
            assert_eq!(events(chunk), whole, "chunks of {chunk}");
        }
    }

    #[test]
    fn an_event_without_an_end_and_bad_text_are_errors() {
        let mut parser = SseParser::default();
        assert_eq!(parser.push(&vec![b'x'; EVENT_BYTES_MAX + 1]), Err(SseError::TooLong));
        let mut parser = SseParser::default();
        assert_eq!(parser.push(b"data: \xff\n\n"), Err(SseError::NotUtf8));
    }

    #[test]
    fn an_unfinished_event_is_not_given_out() {
        let mut parser = SseParser::default();
        assert_eq!(parser.push(b"data: half\n"), Ok(vec![]));
        assert_eq!(parser.push(b"\n"), Ok(vec!["half".to_owned()]));
    }
}
