//! The one driver of a process: its devices, its handles, and how work is issued to streams.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::context::{Context, Streams};
use crate::describe::Machine;
use crate::error::{Answer, Code};
use crate::event::Event;
use crate::fault::{self, Faults, Order};
use crate::locks::lock;
use crate::memory::pool::{Budget, Pool};
use crate::memory::space::{Allocation, Space};
use crate::module::{Function, Module};
use crate::operation::{Effects, Operation, Work};
use crate::races::{Clock, Detector, Policy, Stamp};
use crate::report;
use crate::settings;
use crate::stream::{Gate, Marker, Stream};
use crate::trace::Trace;

/// Handles of one kind that may live at once; a program that leaks them is told by `CUDA_ERROR_OUT_OF_MEMORY`.
const HANDLES_MAX: usize = 1 << 20;
/// Streams that may live in a context, each of which is a thread here.
const STREAMS_MAX: usize = 1024;
/// Handles are far from small integers and from addresses, so that none is taken for another thing.
const HANDLE_BASE: usize = 0x50F7_0000_0000;

/// Objects by handle.
#[derive(Debug)]
pub(crate) struct Handles<T>(Mutex<HashMap<usize, Arc<T>>>);

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Handles<T> {
    pub(crate) fn insert(&self, handle: usize, object: Arc<T>) -> Answer<usize> {
        let mut objects = lock(&self.0);
        if objects.len() >= HANDLES_MAX {
            return Err(Code::OUT_OF_MEMORY);
        }
        objects.insert(handle, object);
        Ok(handle)
    }

    pub(crate) fn get(&self, handle: usize) -> Answer<Arc<T>> {
        lock(&self.0).get(&handle).map(Arc::clone).ok_or(Code::INVALID_HANDLE)
    }

    pub(crate) fn remove(&self, handle: usize) -> Answer<Arc<T>> {
        lock(&self.0).remove(&handle).ok_or(Code::INVALID_HANDLE)
    }

    pub(crate) fn retain(&self, keep: impl Fn(&T) -> bool) {
        lock(&self.0).retain(|_, object| keep(object));
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.0).len()
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        lock(&self.0).values().map(Arc::clone).collect()
    }
}

/// A device and its primary context.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) budget: Budget,
    pub(crate) gate: Arc<Gate>,
    pub(crate) lost: Arc<AtomicU32>,
    pub(crate) primary: Mutex<Primary>,
    pub(crate) default_pool: usize,
    pub(crate) current_pool: AtomicUsize,
}

/// A device's primary context and who holds it.
#[derive(Debug, Default)]
pub(crate) struct Primary {
    pub(crate) retained: u64,
    pub(crate) flags: u32,
    pub(crate) context: Option<Arc<Context>>,
}

/// All there is.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) machine: Machine,
    pub(crate) devices: Vec<Device>,
    pub(crate) space: Space,
    pub(crate) contexts: Handles<Context>,
    pub(crate) events: Handles<Event>,
    pub(crate) pools: Handles<Pool>,
    pub(crate) modules: Handles<Module>,
    pub(crate) functions: Handles<Function>,
    pub(crate) faults: Mutex<Faults>,
    pub(crate) trace: Trace,
    pub(crate) races: Detector,
    pub(crate) calls: Mutex<BTreeMap<&'static str, u64>>,
    /// Held while an operation gets its place and its clock, so that both are the same order.
    issuing: Mutex<()>,
    numbers: AtomicUsize,
    streams_made: AtomicU32,
    pub(crate) operations: AtomicU64,
    pub(crate) operations_done: AtomicU64,
}

static DRIVER: OnceLock<Result<Driver, Code>> = OnceLock::new();

impl Driver {
    /// The driver, once `cuInit` has made it.
    pub(crate) fn get() -> Option<&'static Self> {
        DRIVER.get().and_then(|driver| driver.as_ref().ok())
    }

    /// What `cuInit` does: reads the settings once.
    pub(crate) fn init() -> Answer<&'static Self> {
        DRIVER.get_or_init(Self::from_settings).as_ref().map_err(|code| *code)
    }

    fn from_settings() -> Answer<Self> {
        let machine = Machine::from_settings().map_err(|error| {
            report::say(&error.to_string());
            Code::INVALID_VALUE
        })?;
        if let Some(code) = machine.init_error {
            return Err(Code(code));
        }
        if machine.devices.is_empty() {
            return Err(Code::NO_DEVICE);
        }
        let refuse = |message: String| {
            report::say(&message);
            Code::INVALID_VALUE
        };
        let policy = match settings::get("SOFTCUDA_RACES").as_deref() {
            None | Some("report" | "") => Policy::Report,
            Some("off") => Policy::Off,
            Some("abort") => Policy::Abort,
            Some(other) => return Err(refuse(format!("SOFTCUDA_RACES='{other}': use report, abort or off"))),
        };
        // Read where kernels run; refused here, where somebody sees it.
        match settings::get("SOFTCUDA_KERNEL_ORDER").as_deref() {
            None | Some("up" | "down" | "") => {}
            Some(other) => return Err(refuse(format!("SOFTCUDA_KERNEL_ORDER='{other}': use up or down"))),
        }
        let trace = Trace::new(settings::get("SOFTCUDA_TRACE").as_deref()).map_err(refuse)?;
        let memories: Vec<u64> = machine.devices.iter().map(|device| device.memory).collect();
        let driver = Self::new(machine, Space::new(&memories)?, Detector::new(policy), trace)?;
        driver.order(&settings::get("SOFTCUDA_FAULTS").unwrap_or_default()).map_err(refuse)?;
        Ok(driver)
    }

    fn new(machine: Machine, space: Space, races: Detector, trace: Trace) -> Answer<Self> {
        let mut driver = Self {
            machine,
            devices: Vec::new(),
            space,
            contexts: Handles::default(),
            events: Handles::default(),
            pools: Handles::default(),
            modules: Handles::default(),
            functions: Handles::default(),
            faults: Mutex::default(),
            trace,
            races,
            calls: Mutex::default(),
            issuing: Mutex::default(),
            numbers: AtomicUsize::new(1),
            streams_made: AtomicU32::new(0),
            operations: AtomicU64::new(0),
            operations_done: AtomicU64::new(0),
        };
        for index in 0..driver.machine.devices.len() {
            let pool = driver.pools.insert(driver.handle(), Arc::new(Pool::new(index)))?;
            driver.devices.push(Device {
                budget: Budget::new(driver.machine.devices[index].memory),
                gate: Arc::default(),
                lost: Arc::default(),
                primary: Mutex::default(),
                default_pool: pool,
                current_pool: AtomicUsize::new(pool),
            });
        }
        Ok(driver)
    }

    /// Carries fault orders out.
    pub(crate) fn order(&self, text: &str) -> Result<(), String> {
        let every = |device: Option<usize>| {
            self.devices.iter().enumerate().filter(move |(index, _)| device.is_none_or(|only| only == *index))
        };
        let orders = fault::parse(text)?;
        for order in &orders {
            if let Order::Hang(Some(device)) | Order::Resume(Some(device)) | Order::Lose(Some(device), _) =
                order
                && *device >= self.devices.len()
            {
                return Err(format!("there is no device {device}: there are {}", self.devices.len()));
            }
        }
        for order in orders {
            match order {
                Order::Rule(rule) => lock(&self.faults).add(rule)?,
                Order::Hang(device) => every(device).for_each(|(_, device)| device.gate.set(true)),
                Order::Resume(device) => every(device).for_each(|(_, device)| device.gate.set(false)),
                Order::Lose(device, code) => {
                    every(device).for_each(|(_, device)| device.lost.store(code.0, Ordering::Release));
                }
                Order::Clear => {
                    lock(&self.faults).clear();
                    every(None).for_each(|(_, device)| {
                        device.gate.set(false);
                        device.lost.store(0, Ordering::Release);
                    });
                }
            }
        }
        Ok(())
    }

    /// A number that nothing else has.
    pub(crate) fn handle(&self) -> usize {
        HANDLE_BASE + self.numbers.fetch_add(1, Ordering::Relaxed) * 16
    }

    pub(crate) fn device(&self, ordinal: i32) -> Answer<(usize, &Device)> {
        let index = usize::try_from(ordinal).map_err(|_| Code::INVALID_DEVICE)?;
        self.devices.get(index).map(|device| (index, device)).ok_or(Code::INVALID_DEVICE)
    }

    /// Makes a stream in a context.
    pub(crate) fn start_stream(
        &self,
        context: &Arc<Context>,
        blocking: bool,
        priority: i32,
    ) -> Answer<Arc<Stream>> {
        let number = self.streams_made.fetch_add(1, Ordering::Relaxed);
        Stream::start(context, number, self.races.agent(), blocking, priority)
    }

    /// The stream that a handle names, the default ones included.
    pub(crate) fn stream(&self, context: &Arc<Context>, handle: usize) -> Answer<Arc<Stream>> {
        let mut streams = lock(&context.streams);
        match handle {
            0 | 1 => {
                if let Some(stream) = &streams.legacy {
                    return Ok(Arc::clone(stream));
                }
                let stream = self.start_stream(context, true, 0)?;
                Ok(Arc::clone(streams.legacy.insert(stream)))
            }
            2 => {
                let thread = std::thread::current().id();
                if let Some(stream) = streams.per_thread.get(&thread) {
                    return Ok(Arc::clone(stream));
                }
                if streams.per_thread.len() >= STREAMS_MAX {
                    return Err(Code::OUT_OF_MEMORY);
                }
                let stream = self.start_stream(context, true, 0)?;
                streams.per_thread.insert(thread, Arc::clone(&stream));
                Ok(stream)
            }
            _ => {
                if let Some(stream) = streams.made.get(&handle) {
                    return Ok(Arc::clone(stream));
                }
                drop(streams);
                self.contexts
                    .all()
                    .iter()
                    .find_map(|other| lock(&other.streams).made.get(&handle).map(Arc::clone))
                    .ok_or(Code::INVALID_HANDLE)
            }
        }
    }

    /// Adds a stream that the program made.
    pub(crate) fn add_stream(&self, context: &Arc<Context>, blocking: bool, priority: i32) -> Answer<usize> {
        self.let_go(context);
        let mut streams = lock(&context.streams);
        if streams.made.len() + streams.leaving.len() >= STREAMS_MAX {
            report::say(&format!("a context may have {STREAMS_MAX} streams"));
            return Err(Code::OUT_OF_MEMORY);
        }
        let handle = self.handle();
        streams.made.insert(handle, self.start_stream(context, blocking, priority)?);
        Ok(handle)
    }

    /// Destroys a stream that the program made; what it was given is still done.
    pub(crate) fn end_stream(&self, context: &Context, handle: usize) -> Answer<()> {
        let mut streams = lock(&context.streams);
        let stream = streams.made.remove(&handle).ok_or(Code::INVALID_HANDLE)?;
        stream.close();
        streams.leaving.push(stream);
        drop(streams);
        self.let_go(context);
        Ok(())
    }

    /// Forgets destroyed streams that are through.
    fn let_go(&self, context: &Context) {
        for stream in lock(&context.streams).gone() {
            self.races.retire(stream.agent);
        }
    }

    /// Issues an operation: its place in the stream, what it waits for, and its clock.
    pub(crate) fn issue(
        &self,
        context: &Arc<Context>,
        stream: &Arc<Stream>,
        symbol: &'static str,
        work: Work,
        effects: Effects,
        after: Vec<(Marker, Clock)>,
    ) -> (Marker, Clock) {
        let detail = match &work {
            Work::Launch(launch) => Some(launch.name().to_owned()),
            _ => None,
        };
        stream.wait_for_room();
        let _order = lock(&self.issuing);
        let implicit = self.implicit(context, stream);
        let agents: Vec<usize> = implicit.iter().map(|other| other.agent).collect();
        let (mut markers, mut clocks): (Vec<_>, Vec<_>) = after.into_iter().unzip();
        markers.extend(implicit.iter().map(|other| other.all()));
        markers.retain(|marker| !marker.is_done());
        clocks.retain(|_| self.races.is_on());
        let (count, clock) = self.races.issue(stream.agent, &clocks, &agents);
        let stamp = Arc::new(Stamp {
            agent: stream.agent,
            count,
            clock: clock.clone(),
            symbol,
            detail,
            device: stream.device,
            stream: stream.number,
            sequence: self.operations.fetch_add(1, Ordering::Relaxed),
        });
        (stream.push(Operation { work, after: markers, effects, stamp }), clock)
    }

    /// Streams whose work so far comes first by the legacy stream's rule.
    fn implicit(&self, context: &Context, stream: &Arc<Stream>) -> Vec<Arc<Stream>> {
        if !stream.blocking {
            return Vec::new();
        }
        let streams = lock(&context.streams);
        let is_legacy = streams.legacy.as_ref().is_some_and(|legacy| Arc::ptr_eq(legacy, stream));
        if is_legacy {
            return streams.blocking();
        }
        streams.legacy.iter().map(Arc::clone).collect()
    }

    /// Waits for streams, and lets the host know and the pools settle.
    pub(crate) fn wait_for(&self, context: &Context, streams: &[Arc<Stream>]) -> Answer<()> {
        let points: Vec<(Marker, usize)> = {
            let _order = lock(&self.issuing);
            streams.iter().map(|stream| (stream.all(), stream.agent)).collect()
        };
        let clocks: Vec<Clock> = points.iter().map(|(_, agent)| self.races.reached(*agent)).collect();
        for (marker, _) in &points {
            marker.wait();
        }
        for clock in &clocks {
            self.races.host_knows(clock);
        }
        self.settle(context.device);
        context.poll()
    }

    /// Waits for everything in a context.
    pub(crate) fn wait_for_all(&self, context: &Context) -> Answer<()> {
        let streams = lock(&context.streams).all();
        let answer = self.wait_for(context, &streams);
        self.let_go(context);
        answer
    }

    /// The pools of a device let go of what is above their thresholds.
    pub(crate) fn settle(&self, device: usize) {
        if let Some(budget) = self.devices.get(device).map(|device| &device.budget) {
            for pool in self.pools.all().iter().filter(|pool| pool.device == device) {
                pool.settle(budget);
            }
        }
    }

    /// An allocation is over.
    pub(crate) fn forget(&self, allocation: &Allocation) {
        self.space.release(allocation);
        self.races.forget(allocation);
    }

    /// A pool that allocations may still come from.
    pub(crate) fn pool(&self, handle: usize) -> Answer<Arc<Pool>> {
        self.pools
            .get(handle)
            .and_then(|pool| if pool.is_closed() { Err(Code::INVALID_HANDLE) } else { Ok(pool) })
    }

    /// Gives an allocation's bytes back to its pool or its device.
    pub(crate) fn refund(&self, allocation: &Allocation) {
        let crate::memory::space::Place::Device(device) = allocation.place else { return };
        let budget = &self.devices[device].budget;
        let Some(handle) = allocation.pool else { return budget.give(allocation.charged()) };
        // It is there: a destroyed pool goes with its last allocation.
        if let Ok(pool) = self.pools.get(handle) {
            pool.give(allocation.charged());
            self.bury(handle, &pool);
        }
    }

    /// Ends a destroyed pool that nothing is left of.
    pub(crate) fn bury(&self, handle: usize, pool: &Pool) {
        if pool.is_closed() && pool.figures().used == 0 {
            pool.trim(0, &self.devices[pool.device].budget);
            drop(self.pools.remove(handle));
        }
    }

    /// Ends everything that a context has, without doing what its streams still had to do.
    pub(crate) fn empty(&self, context: &Arc<Context>) {
        let streams = std::mem::take::<Streams>(&mut lock(&context.streams));
        for stream in streams.all() {
            stream.give_up();
            stream.all().wait();
            self.races.retire(stream.agent);
        }
        self.events.retain(|event| event.context != context.handle);
        self.functions.retain(|function| function.context != context.handle);
        self.modules.retain(|module| module.context != context.handle);
        for allocation in self.space.all() {
            if allocation.context == context.handle {
                if !allocation.ending.swap(true, Ordering::AcqRel) {
                    self.refund(&allocation);
                }
                crate::operation::end_now(self, &allocation);
            }
        }
        self.settle(context.device);
        context.heal();
    }
}
