//! A disk that is full after so many bytes, in memory: how a test sees what a full disk does.

use std::io::{Error, ErrorKind};

use redb::StorageBackend;
use redb::backends::InMemoryBackend;

#[derive(Debug)]
pub(crate) struct Quota {
    memory: InMemoryBackend,
    bytes: u64,
}

impl Quota {
    pub(crate) fn new(bytes: u64) -> Self {
        Self { memory: InMemoryBackend::new(), bytes }
    }
}

impl StorageBackend for Quota {
    fn len(&self) -> Result<u64, Error> {
        self.memory.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        self.memory.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        if len > self.bytes {
            return Err(Error::from(ErrorKind::StorageFull));
        }
        self.memory.set_len(len)
    }

    fn sync_data(&self) -> Result<(), Error> {
        self.memory.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.memory.write(offset, data)
    }
}
