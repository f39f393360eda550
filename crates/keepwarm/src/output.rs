//! What commands print: tables and lines for people, or one JSON document for programs.

use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Where a command's result goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

impl Output {
    /// Prints a result: as JSON, or as what `text` makes of it.
    pub(crate) fn show<T: Serialize + ?Sized>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        if self.json {
            let mut document = serde_json::to_string_pretty(value).map_err(Failure::failed)?;
            document.push('\n');
            return print(&document);
        }
        print(&text(value))
    }
}

/// Writes to standard output; a reader that went away ends the process quietly, as pipes expect.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => Ok(written?),
    }
}

/// Writes a line to standard error; there is nobody to tell where that fails.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Rows of cells, in columns as wide as their widest cell.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// Spaces between two columns.
const GAP: &str = "  ";

impl Table {
    pub(crate) fn new<'h>(head: impl IntoIterator<Item = &'h str>) -> Self {
        Self { head: head.into_iter().map(str::to_owned).collect(), rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The lines: columns of numbers to the right, others to the left.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).chain([self.head.len()]).max().unwrap_or(0);
        let cell = |row: &'_ Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
        let all = || std::iter::once(&self.head).chain(&self.rows);
        let widths: Vec<_> = (0..columns)
            .map(|column| all().map(|row| cell(row, column).chars().count()).max().unwrap_or(0))
            .collect();
        let right: Vec<_> = (0..columns).map(|column| self.is_numeric(column)).collect();
        let mut text = String::new();
        for row in all().filter(|row| !row.is_empty()) {
            let mut line = String::new();
            for column in 0..columns {
                let (content, width) = (cell(row, column), widths[column]);
                let padding = " ".repeat(width - content.chars().count());
                line.push_str(if column > 0 { GAP } else { "" });
                line.push_str(&if right[column] { padding + &content } else { content + &padding });
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    fn is_numeric(&self, column: usize) -> bool {
        let mut cells = self
            .rows
            .iter()
            .filter_map(|row| row.get(column))
            .filter(|cell| !matches!(cell.as_str(), "" | "-"));
        let first = cells.next();
        first
            .into_iter()
            .chain(cells)
            .all(|cell| cell.starts_with(|c: char| c.is_ascii_digit()) && !is_id(cell))
            && first.is_some()
    }
}

/// UUIDs and times begin with digits but are no numbers.
fn is_id(cell: &str) -> bool {
    cell.len() >= 20 && cell.contains('-')
}

/// Milliseconds, with as many digits as say something.
pub(crate) fn millis(value: f64) -> String {
    match value {
        value if value >= 1000.0 => format!("{:.2} s", value / 1000.0),
        value if value >= 10.0 => format!("{value:.0} ms"),
        value => format!("{value:.1} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_numbers_stand_right() {
        let mut table = Table::new(["name", "bytes", "id"]);
        table.row(["a".to_owned(), "5".to_owned(), "0197a3c2-6d0e-7b1a-9c54-2f6d8a3be041".to_owned()]);
        table.row(["größer".to_owned(), "1500".to_owned(), String::new()]);
        table.row(["c".to_owned(), "-".to_owned()]);
        let expected = "name    bytes  id\n\
                        a           5  0197a3c2-6d0e-7b1a-9c54-2f6d8a3be041\n\
                        größer   1500\n\
                        c           -\n";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn an_empty_table_has_its_head_alone() {
        assert_eq!(Table::new(["a", "b"]).render(), "a  b\n");
        assert_eq!(Table::default().render(), "");
    }

    #[test]
    fn durations_have_the_digits_that_matter() {
        assert_eq!([millis(2.34), millis(23.4), millis(2340.0)], ["2.3 ms", "23 ms", "2.34 s"]);
    }
}
