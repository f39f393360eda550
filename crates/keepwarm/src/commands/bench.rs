//! `keepwarm bench`: puts and gets of one size against a running server.
//!
//! Each connection has a session of its own with one part of untyped bytes, puts all of it, gets all of it
//! back, and so on; both ends hash every byte, and the first get is compared with what was put. The times
//! are from before the request to after the last byte. One warm-up round is not counted.

use std::time::Instant;

use bytes::Bytes as Buffer;
use futures::future::try_join_all;
use keepwarm_client::{Client, Form, Layout, NewSession, PartBody, PartLayout, WriteOptions};
use keepwarm_types::Bytes;
use serde::Serialize;
use uuid::Uuid;

use super::client;
use crate::cli::BenchArgs;
use crate::failure::Failure;
use crate::output::{Output, Table, millis};

const PART: &str = "bench";

#[derive(Debug, Serialize)]
struct Figures {
    operation: &'static str,
    calls: usize,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    gb_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    url: String,
    part_bytes: u64,
    connections: u32,
    figures: Vec<Figures>,
}

pub(crate) async fn run(args: &BenchArgs, output: Output) -> Result<(), Failure> {
    let size = usize::try_from(args.size.0).map_err(Failure::usage)?;
    if size == 0 {
        return Err(Failure::usage("--size 0B: there is nothing to measure"));
    }
    let body = pattern(size);
    let clients: Vec<_> = (0..args.connections).map(|_| client(&args.remote)).collect::<Result<_, _>>()?;
    let sessions = try_join_all(clients.iter().map(create)).await?;
    let measured = measure(&clients, &sessions, &body, args.count).await;
    for (client, id) in clients.iter().zip(&sessions) {
        client.delete(*id).await?;
    }
    let report = Report {
        url: args.remote.url.clone(),
        part_bytes: args.size.0,
        connections: args.connections,
        figures: measured?,
    };
    output.show(&report, text)
}

/// Bytes that do not repeat within a block and that no layer can shorten.
fn pattern(size: usize) -> Buffer {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        bytes.extend_from_slice(&next().to_le_bytes());
    }
    bytes.truncate(size);
    bytes.into()
}

async fn create(client: &Client) -> Result<Uuid, Failure> {
    let part = PartLayout { name: PART.to_owned(), form: Form::Bytes { block_bytes: None }, cold: None };
    let layout = Layout { model: "bench".to_owned(), fingerprint: "bench".to_owned(), parts: vec![part] };
    let new = NewSession { ttl_s: Some(3600.0), ..NewSession::new(layout) };
    Ok(client.create(&new).await?.id)
}

async fn measure(
    clients: &[Client],
    sessions: &[Uuid],
    body: &Buffer,
    count: u32,
) -> Result<Vec<Figures>, Failure> {
    let pairs = || clients.iter().zip(sessions);
    try_join_all(pairs().map(|(client, id)| warm_up(client, *id, body))).await?;
    let begun = Instant::now();
    let puts = try_join_all(pairs().map(|(client, id)| puts(client, *id, body, count))).await?;
    let put = figures("put", puts, body.len(), begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    let gets = try_join_all(pairs().map(|(client, id)| gets(client, *id, body.len(), count))).await?;
    let get = figures("get", gets, body.len(), begun.elapsed().as_secs_f64());
    Ok(vec![put, get])
}

async fn warm_up(client: &Client, id: Uuid, body: &Buffer) -> Result<(), Failure> {
    client.put_part(id, PART, PartBody::from(body.clone()), &WriteOptions::default()).await?;
    let back = client.part(id, PART).await?.bytes().await?;
    if back != *body {
        return Err(Failure::failed(format!("session {id}: what was read differs from what was written")));
    }
    Ok(())
}

async fn puts(client: &Client, id: Uuid, body: &Buffer, count: u32) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        client.put_part(id, PART, PartBody::from(body.clone()), &WriteOptions::default()).await?;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(times)
}

async fn gets(client: &Client, id: Uuid, length: usize, count: u32) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        let mut reader = client.part(id, PART).await?;
        let mut read = 0;
        while let Some(chunk) = reader.next_chunk().await? {
            read += chunk.len();
        }
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
        if read != length {
            return Err(Failure::failed(format!("session {id}: {read} bytes came back of {length}")));
        }
    }
    Ok(times)
}

/// The value below which `share` of the sorted values lie (nearest rank).
pub(crate) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).or(sorted.last()).copied().unwrap_or(f64::NAN)
}

fn figures(operation: &'static str, times: Vec<Vec<f64>>, bytes: usize, elapsed_s: f64) -> Figures {
    let mut times = times.concat();
    times.sort_by(f64::total_cmp);
    Figures {
        operation,
        calls: times.len(),
        p50_ms: percentile(&times, 0.50),
        p99_ms: percentile(&times, 0.99),
        max_ms: percentile(&times, 1.0),
        gb_per_s: (bytes * times.len()) as f64 / elapsed_s / 1e9,
    }
}

fn text(report: &Report) -> String {
    let mut table = Table::new(["operation", "calls", "p50", "p99", "max", "GB/s"]);
    for figures in &report.figures {
        table.row([
            figures.operation.to_owned(),
            figures.calls.to_string(),
            millis(figures.p50_ms),
            millis(figures.p99_ms),
            millis(figures.max_ms),
            format!("{:.2}", figures.gb_per_s),
        ]);
    }
    let connections = if report.connections == 1 { "connection" } else { "connections" };
    format!(
        "parts of {} over {} {connections}\n{}",
        Bytes(report.part_bytes),
        report.connections,
        table.render()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<_> = (1..=100).map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|share| percentile(&values, share)), [50.0, 99.0, 100.0]);
        assert_eq!(percentile(&[7.0], 0.5), 7.0);
        assert!(percentile(&[], 0.5).is_nan());
    }

    #[test]
    fn throughput_counts_all_connections_over_the_time_that_passed() {
        let figures = figures("put", vec![vec![2.0, 4.0], vec![3.0, 1.0]], 1_000_000, 0.004);
        assert_eq!((figures.calls, figures.p50_ms, figures.max_ms), (4, 2.0, 4.0));
        assert!((figures.gb_per_s - 1.0).abs() < 1e-9);
    }

    #[test]
    fn the_pattern_has_its_length_and_does_not_repeat() {
        let bytes = pattern(10_001);
        assert_eq!(bytes.len(), 10_001);
        assert_ne!(bytes[..4096], bytes[4096..8192]);
    }
}
