//! For tests of the NBD server: the server in this process, a disk whose requests can be held up, and a
//! blocking client.

#![allow(dead_code, reason = "each test file uses only its part of this")]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use event_listener::Event;
use heliostat::front::nbd::{ExportSettings, NbdServer, ServerSettings};
use heliostat::serve::Seat;
use heliostat_block::buffer::Buffer;
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::graph::{Graph, Place, Role};
use heliostat_block::name::NodeName;
use heliostat_block::nbd::client::{Allocation, Found, Negotiation, NegotiationError, Wish};
use heliostat_block::nbd::client_reply::{Answer, Answered, Conversation, Failure};
use heliostat_block::nbd::client_request::Ask;
use heliostat_block::nbd::{Access, Cookie, ReplyStyle};
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{
    Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace,
};
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{self, OpenOptions};
use heliostat_host::socket::Address;

use super::common::wait;

/// Requests that no server takes from a client that reads no answers.
pub const ASKED_MAX: u32 = 4096;

/// A server on a Unix socket in a folder of its own.
pub struct Served {
    pub server: NbdServer,
    pub graph: Graph,
    folder: tempfile::TempDir,
}

impl Served {
    /// Starts a server without exports.
    pub fn start(settings: ServerSettings) -> Self {
        let folder = super::common::folder();
        let address = Address::Unix(folder.path().join("nbd"));
        let server = NbdServer::start(&address, settings).unwrap();
        Self { server, graph: Graph::default(), folder }
    }

    /// A server with one writable export `disk` in memory.
    pub fn with_memory(len: usize) -> (Self, Arc<Memory>) {
        let served = Self::start(ServerSettings::default());
        let memory = Memory::new(len);
        served.export("disk", served.node("disk", Arc::clone(&memory)));
        (served, memory)
    }

    /// A server with one writable export `disk` of a file.
    pub fn with_file(path: &Path, cache: open::Cache) -> Self {
        let served = Self::start(ServerSettings::default());
        let options = OpenOptions { cache, discard: open::Discard::Unmap, ..OpenOptions::default() };
        let storage = FileStorage::open(path, &options).unwrap();
        served.export("disk", served.node("disk", Arc::new(storage)));
        served
    }

    pub fn node(&self, name: &str, storage: Arc<impl Storage>) -> Arc<Node> {
        let options = NodeOptions { discard: Discard::Unmap, ..NodeOptions::default() };
        let driver = Driver::Raw(Raw::whole(storage));
        let node = Node::new(NodeName::new(name).unwrap(), driver, options, Arc::new(RealClock::new()));
        self.graph.add(Arc::clone(&node)).unwrap();
        node
    }

    pub fn place(&self, node: &Arc<Node>) -> Arc<Place> {
        self.graph.attach(node, Role::Export { id: node.name().to_string(), writable: true }).unwrap()
    }

    pub fn export(&self, name: &str, node: Arc<Node>) {
        self.server.add_export(self.settings(name, &node)).unwrap();
    }

    pub fn settings(&self, name: &str, node: &Arc<Node>) -> ExportSettings {
        ExportSettings {
            name: name.to_owned(),
            description: String::new(),
            seat: Seat::new(self.place(node)),
            access: Access::Writable,
            is_default: false,
            clients: None,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd")
    }

    /// The address of an export, as the tools want it.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(super::common::wait::LIMIT)).unwrap();
        stream.set_write_timeout(Some(super::common::wait::LIMIT)).unwrap();
        stream
    }

    pub fn guest(&self, export: &str) -> Guest {
        Guest::new(self.raw(), export, ReplyStyle::Structured).unwrap()
    }
}

/// A disk in memory whose writes and flushes wait as long as [`Memory::hold`] says.
pub struct Memory {
    bytes: Mutex<Vec<u8>>,
    held: AtomicBool,
    released: Event,
    /// Requests that have reached the disk.
    pub started: AtomicU64,
    pub flushes: AtomicU64,
}

impl Memory {
    pub fn new(len: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; len]),
            held: AtomicBool::new(false),
            released: Event::new(),
            started: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        })
    }

    /// From now on writes wait.
    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    /// Lets those that wait go on, and later ones through.
    pub fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.released.notify(usize::MAX);
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.bytes.lock().unwrap()[offset..offset + len].to_vec()
    }

    /// Waits until so many requests have reached the disk.
    pub fn wait_started(&self, count: u64) {
        let reached = || (self.started.load(Ordering::SeqCst) >= count).then_some(());
        super::common::wait::until("requests at the disk", super::common::wait::LIMIT, reached).unwrap();
    }

    fn change(&self, change: impl FnOnce(&mut [u8]) + 'static) -> IoFuture<'_, ()> {
        self.started.fetch_add(1, Ordering::SeqCst);
        if !self.held.load(Ordering::SeqCst) {
            change(&mut self.bytes.lock().unwrap());
            return IoFuture::ready(Ok(()));
        }
        IoFuture::pending(async move {
            while self.held.load(Ordering::SeqCst) {
                let released = self.released.listen();
                if self.held.load(Ordering::SeqCst) {
                    released.await;
                }
            }
            change(&mut self.bytes.lock().unwrap());
            Ok(())
        })
    }
}

fn index(value: u64) -> usize {
    value.try_into().unwrap()
}

impl Storage for Memory {
    fn traits(&self) -> Traits {
        Traits {
            block_size: 1,
            preferred_size: 4096,
            read_only: false,
            can_discard: true,
            can_zero_fast: true,
            can_resize: true,
            remote: false,
        }
    }

    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len().try_into().unwrap()
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.bytes.lock().unwrap().resize(index(size), 0);
        IoFuture::ready(Ok(()))
    }

    fn allocated_size(&self) -> Option<u64> {
        None
    }

    fn read(&self, offset: u64, mut buffer: Buffer) -> IoFuture<'_, Buffer> {
        self.started.fetch_add(1, Ordering::SeqCst);
        let len = buffer.len();
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[index(offset)..index(offset) + len]);
        IoFuture::ready(Ok(buffer))
    }

    fn write(&self, offset: u64, data: Bytes, _durability: Durability) -> IoFuture<'_, ()> {
        self.change(move |bytes| bytes[index(offset)..index(offset) + data.len()].copy_from_slice(&data))
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        _space: ZeroSpace,
        _effort: ZeroEffort,
        _durability: Durability,
    ) -> IoFuture<'_, ()> {
        self.change(move |bytes| bytes[index(range.offset())..index(range.end())].fill(0))
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        self.change(move |bytes| bytes[index(range.offset())..index(range.end())].fill(0))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.change(|_| ())
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        IoFuture::ready(Ok(vec![Extent { range, status: ExtentStatus::Data }]))
    }
}

/// A client that waits for what it asks.
pub struct Guest {
    pub stream: UnixStream,
    pub found: Found,
    pub conversation: Conversation,
    input: BytesMut,
    early: BTreeMap<Cookie, Result<Answered, Failure>>,
}

/// Why a client got no export.
#[derive(Debug)]
pub enum Refused {
    Negotiation(NegotiationError),
    Io(io::Error),
}

impl Guest {
    pub fn new(mut stream: UnixStream, export: &str, replies: ReplyStyle) -> Result<Self, Refused> {
        let wish = Wish { export: export.to_owned(), replies, allocation: Allocation::Wanted };
        let mut negotiation = Negotiation::new(wish);
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        loop {
            let found = negotiation.step(&mut input, &mut output).map_err(Refused::Negotiation)?;
            stream.write_all(&output.split()).map_err(Refused::Io)?;
            if let Some(found) = found {
                let conversation = Conversation::new(&found);
                return Ok(Self { stream, found, conversation, input, early: BTreeMap::new() });
            }
            receive(&mut stream, &mut input).map_err(Refused::Io)?;
        }
    }

    /// Asks for `len` bytes again and again without reading, until the server takes no more. Answers how often, and what
    /// of the last request it did not take. The socket does not block then.
    pub fn gorge(&mut self, len: usize) -> (u32, BytesMut) {
        self.stream.set_nonblocking(true).unwrap();
        let mut output = BytesMut::new();
        let (mut asked, mut blocked_at) = (0, None);
        wait::until("the server to take no more", wait::LIMIT, || {
            while asked < ASKED_MAX {
                if output.is_empty() {
                    let read = Ask::Read { offset: 0, buffer: Buffer::zeroed(len) };
                    self.conversation.ask(read, &mut output).unwrap();
                    asked += 1;
                }
                match self.stream.write(&output) {
                    Ok(sent) => drop(output.split_to(sent)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
            // Blocked twice at the same request, with time for the server in between.
            let is_stuck = blocked_at == Some(asked);
            blocked_at = Some(asked);
            is_stuck.then_some(())
        })
        .unwrap();
        (asked, output)
    }

    /// Sends a request without waiting for its answer.
    pub fn send(&mut self, ask: Ask, payload: &[u8]) -> io::Result<Cookie> {
        let mut output = BytesMut::new();
        let cookie = self.conversation.ask(ask, &mut output).unwrap();
        output.extend_from_slice(payload);
        self.stream.write_all(&output)?;
        Ok(cookie)
    }

    /// Waits for whichever answer comes next.
    pub fn next(&mut self) -> io::Result<Answer> {
        loop {
            if let Some(answer) = self.conversation.next(&mut self.input).unwrap() {
                return Ok(answer);
            }
            receive(&mut self.stream, &mut self.input)?;
        }
    }

    /// Waits for the answer to one request.
    pub fn wait(&mut self, cookie: Cookie) -> Result<Answered, Failure> {
        loop {
            if let Some(outcome) = self.early.remove(&cookie) {
                return outcome;
            }
            let answer = self.next().unwrap();
            self.early.insert(answer.cookie, answer.outcome);
        }
    }

    pub fn ask(&mut self, ask: Ask, payload: &[u8]) -> Result<Answered, Failure> {
        let cookie = self.send(ask, payload).unwrap();
        self.wait(cookie)
    }

    pub fn send_write(&mut self, offset: u64, data: &[u8]) -> Cookie {
        let range = ByteRange::new(offset, data.len().try_into().unwrap()).unwrap();
        self.send(Ask::Write { range, durability: Durability::Cached }, data).unwrap()
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let cookie = self.send_write(offset, data);
        self.wait(cookie).unwrap();
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        match self.ask(Ask::Read { offset, buffer: Buffer::zeroed(len) }, &[]) {
            Ok(Answered::Data(buffer)) => buffer.to_vec(),
            other => panic!("no data but {other:?}"),
        }
    }
}

fn receive(stream: &mut UnixStream, input: &mut BytesMut) -> io::Result<()> {
    let mut bytes = [0; 65536];
    match stream.read(&mut bytes) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(received) => {
            input.extend_from_slice(&bytes[..received]);
            Ok(())
        }
        // A read with a limit is broken off when the process is stopped for a moment.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        Err(error) => Err(error),
    }
}

/// Waits until the server has closed the connection; answers what it said before.
pub fn rest_of(stream: &mut UnixStream) -> Vec<u8> {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        // Closed with bytes of ours unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the server did not close the connection: {error}"),
    }
    rest
}
