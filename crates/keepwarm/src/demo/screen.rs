//! What the demo shows while it runs: a picture that is drawn again and again on a terminal, plain lines
//! elsewhere, nothing where one JSON document was asked for.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossterm::cursor::MoveUp;
use crossterm::queue;
use crossterm::terminal::{Clear, ClearType, size};
use keepwarm_client::{Client, Session, SessionFilter};
use keepwarm_types::Bytes;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::output::{Output, Table, millis, print};

/// How often the picture is drawn and the server is asked.
const FRAME: Duration = Duration::from_millis(200);
/// Columns where the terminal does not say.
const COLUMNS_DEFAULT: u16 = 100;
/// Characters of a full bar.
const BAR: usize = 24;
/// Sessions asked for; the demo has fewer.
const SESSIONS_ASKED: u32 = 100;

/// One conversation's line.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    pub(crate) title: String,
    pub(crate) session: Uuid,
    /// The node and its GPU.
    pub(crate) home: Option<String>,
    pub(crate) tier: String,
    pub(crate) tokens: u64,
    pub(crate) ttft_ms: Option<f64>,
    pub(crate) source: String,
    pub(crate) speaking: bool,
}

/// How full a memory is.
#[derive(Debug, Clone, Default)]
struct Fill {
    name: String,
    used: u64,
    reserved: u64,
    sessions: u64,
}

#[derive(Debug, Default)]
struct Board {
    phase: String,
    rows: Vec<Row>,
    fills: Vec<Fill>,
    answer: String,
    client: Option<Client>,
    drawn: u16,
    done: bool,
}

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Picture,
    Lines,
    Silent,
}

/// The demo's screen; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Screen {
    board: Arc<Mutex<Board>>,
    style: Style,
}

impl Screen {
    pub(crate) fn new(output: Output) -> Self {
        let style = match (output.json, io::stdout().is_terminal()) {
            (true, _) => Style::Silent,
            (false, true) => Style::Picture,
            (false, false) => Style::Lines,
        };
        Self { board: Arc::default(), style }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line that stays.
    pub(crate) fn say(&self, line: &str) {
        if self.style == Style::Silent {
            return;
        }
        let mut board = self.board();
        // Nobody is left to tell where the terminal is gone.
        let _ = erase(&mut board);
        let _ = print(&format!("{line}\n"));
    }

    /// What is going on now.
    pub(crate) fn phase(&self, phase: impl Into<String>) {
        let phase = phase.into();
        if self.style == Style::Lines {
            let _ = print(&format!("-- {phase}\n"));
        }
        self.board().phase = phase;
    }

    pub(crate) fn rows(&self, rows: Vec<Row>) {
        self.board().rows = rows;
    }

    /// The server to ask; none while it is down.
    pub(crate) fn watch(&self, client: Option<Client>) {
        self.board().client = client;
    }

    /// A conversation is about to answer.
    pub(crate) fn speaking(&self, conversation: usize) {
        let mut board = self.board();
        board.answer.clear();
        for (index, row) in board.rows.iter_mut().enumerate() {
            row.speaking = index == conversation;
        }
    }

    /// More of the answer.
    pub(crate) fn heard(&self, text: &str) {
        self.board().answer.push_str(text);
    }

    /// The answer is there.
    pub(crate) fn spoke(&self, conversation: usize, ttft_ms: f64, source: &str, text: &str) {
        let mut board = self.board();
        let Some(row) = board.rows.get_mut(conversation) else { return };
        row.ttft_ms = Some(ttft_ms);
        source.clone_into(&mut row.source);
        let line = format!(
            "{:<42} {} {:<7} {:>5} tokens  first token {:>8} from {:<9} {}",
            row.title,
            row.home.as_deref().unwrap_or("-"),
            row.tier,
            row.tokens,
            millis(ttft_ms),
            source,
            one_line(text)
        );
        let arenas: Vec<_> =
            board.fills.iter().map(|fill| format!("{} {:.0}%", fill.name, fill.share() * 100.0)).collect();
        if self.style == Style::Lines {
            let _ = print(&format!("{line}  [{}]\n", arenas.join(" ")));
        }
    }

    /// Asks the server once how full its memory is and where its sessions are.
    pub(crate) async fn refresh(&self) {
        let Some(client) = self.board().client.clone() else { return };
        let filter = SessionFilter::default();
        let asked = tokio::join!(client.cluster(), client.session_page(&filter, None, SESSIONS_ASKED));
        let (Ok(cluster), Ok(page)) = asked else { return };
        let mut board = self.board();
        board.fills.clear();
        for node in &cluster.nodes {
            for gpu in &node.gpus {
                board.fills.push(Fill::new(format!("{} hbm", node.name), &gpu.arena, gpu.sessions));
            }
            if let Some(pinned) = &node.pinned {
                board.fills.push(Fill::new(format!("{} pinned", node.name), &pinned.arena, pinned.sessions));
            }
        }
        for row in &mut board.rows {
            if let Some(session) = page.sessions.iter().find(|session| session.id == row.session) {
                row.take(session);
            }
        }
    }

    /// Draws and asks until [`Self::finish`].
    pub(crate) fn animate(&self) -> JoinHandle<()> {
        let screen = self.clone();
        tokio::spawn(async move {
            let mut frames = tokio::time::interval(FRAME);
            frames.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                frames.tick().await;
                screen.refresh().await;
                let mut board = screen.board();
                if board.done {
                    return;
                }
                if screen.style == Style::Picture {
                    let _ = draw(&mut board);
                }
            }
        })
    }

    /// Takes the picture away; lines that were said stay.
    pub(crate) fn finish(&self) {
        let mut board = self.board();
        board.done = true;
        if self.style == Style::Picture {
            let _ = erase(&mut board);
        }
    }
}

impl Row {
    fn take(&mut self, session: &Session) {
        self.home =
            session.home.as_ref().and_then(|home| Some(format!("{}/{}", home.node, home.gpus.first()?)));
        self.tokens = session.transcript_tokens.max(session.length_tokens);
        let tiers = session.tiers;
        let tier = match (tiers.hbm, tiers.pinned, session.cold_reason) {
            (1.., _, _) => "hbm".to_owned(),
            (0, 1.., _) => "pinned".to_owned(),
            (0, 0, Some(_)) => "cold".to_owned(),
            (0, 0, None) => "-".to_owned(),
        };
        self.tier = tier;
    }
}

impl Fill {
    fn new(name: String, arena: &keepwarm_client::Arena, sessions: u64) -> Self {
        Self { name, used: arena.used_bytes, reserved: arena.reserved_bytes, sessions }
    }

    fn share(&self) -> f64 {
        if self.reserved == 0 { 0.0 } else { self.used as f64 / self.reserved as f64 }
    }
}

/// Text on one line.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn bar(share: f64) -> String {
    let full = ((share * BAR as f64).round() as usize).min(BAR);
    format!("[{}{}]", "#".repeat(full), ".".repeat(BAR - full))
}

fn picture(board: &Board) -> Vec<String> {
    let mut lines = vec![String::new(), board.phase.clone(), String::new()];
    let mut table = Table::new([" ", "session", "node/gpu", "tier", "tokens", "first token", "from"]);
    for row in &board.rows {
        table.row([
            if row.speaking { ">" } else { " " }.to_owned(),
            row.title.clone(),
            row.home.clone().unwrap_or_else(|| "-".to_owned()),
            row.tier.clone(),
            row.tokens.to_string(),
            row.ttft_ms.map_or_else(|| "-".to_owned(), millis),
            row.source.clone(),
        ]);
    }
    lines.extend(table.render().lines().map(str::to_owned));
    lines.push(String::new());
    for fill in &board.fills {
        let (used, reserved) = (Bytes(fill.used), Bytes(fill.reserved));
        lines.push(format!(
            "  {:<10} {} {used} of {reserved}, {} sessions",
            fill.name,
            bar(fill.share()),
            fill.sessions
        ));
    }
    lines.push(String::new());
    lines.push(format!("  “{}", one_line(&board.answer)));
    lines
}

fn erase(board: &mut Board) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if board.drawn > 0 {
        queue!(out, MoveUp(board.drawn), Clear(ClearType::FromCursorDown))?;
        board.drawn = 0;
    }
    out.flush()
}

fn draw(board: &mut Board) -> io::Result<()> {
    let columns = usize::from(size().map_or(COLUMNS_DEFAULT, |(columns, _)| columns).max(2)) - 1;
    let lines = picture(board);
    let mut out = io::stdout().lock();
    if board.drawn > 0 {
        queue!(out, MoveUp(board.drawn))?;
    }
    for line in &lines {
        let cut: String = line.chars().take(columns).collect();
        write!(out, "{cut}")?;
        queue!(out, Clear(ClearType::UntilNewLine))?;
        writeln!(out)?;
    }
    queue!(out, Clear(ClearType::FromCursorDown))?;
    board.drawn = u16::try_from(lines.len()).unwrap_or(u16::MAX);
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_full_as_the_memory() {
        assert_eq!(bar(0.0), format!("[{}]", ".".repeat(BAR)));
        assert_eq!(bar(0.5), format!("[{}{}]", "#".repeat(BAR / 2), ".".repeat(BAR / 2)));
        assert_eq!(bar(7.0), format!("[{}]", "#".repeat(BAR)));
    }

    #[test]
    fn the_picture_has_a_line_for_each_session_and_memory() {
        let row = Row {
            title: "Tides".to_owned(),
            tokens: 1234,
            ttft_ms: Some(12.3),
            speaking: true,
            ..Row::default()
        };
        let fill = Fill { name: "gpu 0".to_owned(), used: 1 << 20, reserved: 2 << 20, sessions: 3 };
        let board =
            Board { rows: vec![row], fills: vec![fill], answer: "It\nis".to_owned(), ..Board::default() };
        let lines = picture(&board);
        assert!(
            lines.iter().any(|line| line.contains("> ") && line.contains("Tides") && line.contains("12 ms")),
            "{lines:#?}"
        );
        assert!(lines.iter().any(|line| line.contains("1MiB of 2MiB, 3 sessions")));
        assert_eq!(lines.last().unwrap(), "  “It is");
    }
}
