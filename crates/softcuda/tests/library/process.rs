//! Runs a test's body in a process whose loader finds the library and whose environment describes the machine.

use std::collections::HashMap;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// Set in the child: which call of `run` in its test is its own.
const CHILD: &str = "SOFTCUDA_TEST_CHILD";
/// What the child says once its body is through: without it a name that matches no test would pass.
const THROUGH: &str = "softcuda-test-body-is-through";

/// What a child left.
pub(crate) struct Ran {
    /// In a child, of a call that is not its own: there is nothing to see.
    elsewhere: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) through: bool,
    /// How the process ended.
    status: String,
}

impl Ran {
    /// Stops the test where the child did not come through.
    pub(crate) fn passed(self) -> Self {
        assert!(
            self.elsewhere || self.through,
            "the child failed: {}\n{}\n{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Stops the test where the child did not say that.
    pub(crate) fn said(self, word: &str) -> Self {
        assert!(
            self.elsewhere || self.stderr.contains(word),
            "the child did not say '{word}':\n{}",
            self.stderr
        );
        self
    }

    /// Stops the test where the child said that.
    pub(crate) fn did_not_say(self, word: &str) -> Self {
        assert!(!self.stderr.contains(word), "the child said '{word}':\n{}", self.stderr);
        self
    }
}

/// The path of a test's closure, as the test harness names the test.
fn name_of<F>(_body: &F) -> String {
    let name = std::any::type_name::<F>();
    let name = name.split_once("::").map_or(name, |(_, rest)| rest);
    name.split("::{{closure}}").next().unwrap_or(name).to_owned()
}

/// How many calls of `run` this test has made before; other tests of this process have counts of their own.
fn number_of_call(name: &str) -> usize {
    static CALLS: Mutex<Option<HashMap<String, usize>>> = Mutex::new(None);
    let mut calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    let count = calls.get_or_insert_default().entry(name.to_owned()).or_default();
    *count += 1;
    *count - 1
}

/// Whether this is a child.
pub(crate) fn in_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// In the parent: what the child that ran `body` left. In the child: runs it, and ends the process.
pub(crate) fn run<F: FnOnce()>(environment: &[(&str, &str)], body: F) -> Ran {
    let name = name_of(&body);
    let call = number_of_call(&name).to_string();
    if let Ok(own) = std::env::var(CHILD) {
        if own != call {
            return Ran {
                elsewhere: true,
                stdout: String::new(),
                stderr: String::new(),
                through: false,
                status: String::new(),
            };
        }
        body();
        eprintln!("{THROUGH}");
        std::process::exit(0);
    }
    let built =
        softcuda::layout::beside_this_program().expect("cargo builds a package's library before its tests");
    let folder = tempfile::tempdir().expect("a folder");
    softcuda::layout::lay_out(&built, folder.path()).expect("the library is laid out");
    let mut child = again(&name);
    child.env("LD_LIBRARY_PATH", folder.path()).env(CHILD, call).env("SOFTCUDA_DEVICES", "memory=64MiB");
    for variable in ["CUDA_VISIBLE_DEVICES", "SOFTCUDA_FAULTS", "SOFTCUDA_KERNELS", "SOFTCUDA_RACES"] {
        child.env_remove(variable);
    }
    read(&child.envs(environment.iter().copied()).output().expect("the child starts"))
}

/// This program once more, to run one test.
pub(crate) fn again(name: &str) -> Command {
    let mut child = Command::new(std::env::current_exe().expect("this program has a path"));
    child.args(["--exact", name, "--nocapture"]);
    child
}

pub(crate) fn read(output: &Output) -> Ran {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Ran {
        elsewhere: false,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        through: output.status.success() && stderr.contains(THROUGH),
        stderr,
        status: output.status.to_string(),
    }
}
