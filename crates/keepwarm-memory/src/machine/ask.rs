//! Asks a source for all there is, within limits; what it does not answer is noted.

use super::{MigMode, NvmlDevice, NvmlMemory, NvmlProcess, NvmlReport};

/// GPUs of a machine that are asked for.
pub(super) const GPUS_MAX: u32 = 64;
/// Instances of a GPU that are asked for: no GPU has more than seven.
pub(super) const INSTANCES_MAX: u32 = 16;
/// Processes of a GPU that are listed.
pub(super) const PROCESSES_MAX: usize = 1024;

/// Why there is no answer.
#[derive(Debug, Clone)]
pub(super) enum Silence {
    /// The device has no such thing.
    NoSuch,
    /// It should have answered.
    Failed(String),
}

pub(super) type Answer<T> = Result<T, Silence>;

/// A GPU, or an instance of one, by numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Gpu(u32),
    Instance(u32, u32),
}

/// Who is asked.
pub(super) trait Source {
    fn driver(&self) -> Answer<String>;
    fn gpus(&self) -> Answer<u32>;
    /// Instances that the GPU may have; numbers below may be free.
    fn instances(&self, gpu: u32) -> Answer<u32>;
    fn name(&self, which: Which) -> Answer<String>;
    fn uuid(&self, which: Which) -> Answer<String>;
    fn memory(&self, which: Which) -> Answer<NvmlMemory>;
    fn processes(&self, which: Which) -> Answer<Vec<NvmlProcess>>;
    fn mig(&self, gpu: u32) -> Answer<MigMode>;
}

/// Asks for all there is.
pub(super) fn report(source: &impl Source) -> NvmlReport {
    let mut asked = Asked { source, unanswered: Vec::new() };
    let driver = asked.take("the driver's version", source.driver()).unwrap_or_default();
    let count = asked.take("the number of GPUs", source.gpus()).unwrap_or(0);
    let gpus = (0..count.min(GPUS_MAX)).filter_map(|number| asked.gpu(number)).collect();
    NvmlReport { driver, gpus, unanswered: asked.unanswered }
}

struct Asked<'a, S> {
    source: &'a S,
    unanswered: Vec<String>,
}

impl<S: Source> Asked<'_, S> {
    /// An answer, or none; why there is none is noted, unless there is no such thing.
    fn take<T>(&mut self, what: &str, answer: Answer<T>) -> Option<T> {
        match answer {
            Ok(answer) => Some(answer),
            Err(Silence::NoSuch) => None,
            Err(Silence::Failed(why)) => {
                self.unanswered.push(format!("{what}: {why}"));
                None
            }
        }
    }

    fn gpu(&mut self, number: u32) -> Option<NvmlDevice> {
        let mut gpu = self.device(Which::Gpu(number), number, &format!("GPU {number}"))?;
        gpu.mig = self.take(&format!("the MIG mode of GPU {number}"), self.source.mig(number));
        if gpu.mig.is_some_and(|mig| mig.enabled) {
            let what = format!("the instances of GPU {number}");
            let count = self.take(&what, self.source.instances(number)).unwrap_or(0);
            let instance =
                |at| self.device(Which::Instance(number, at), at, &format!("instance {at} of GPU {number}"));
            gpu.instances = (0..count.min(INSTANCES_MAX)).filter_map(instance).collect();
        }
        Some(gpu)
    }

    /// One that does not say who it is cannot be used.
    fn device(&mut self, which: Which, number: u32, what: &str) -> Option<NvmlDevice> {
        let source = self.source;
        let uuid = self.take(&format!("the UUID of {what}"), source.uuid(which))?;
        let name = self.take(&format!("the name of {what}"), source.name(which)).unwrap_or_default();
        let memory = self.take(&format!("the memory of {what}"), source.memory(which));
        let processes = self.take(&format!("the processes of {what}"), source.processes(which));
        let mut processes = processes.unwrap_or_default();
        processes.truncate(PROCESSES_MAX);
        Some(NvmlDevice { number, name, uuid, memory, processes, mig: None, instances: Vec::new() })
    }
}
