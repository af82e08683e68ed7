//! [`Guest`]: a client of an NBD export that behaves as a machine would, and keeps a record of what it did.
//!
//! It runs on a thread of its own and knows nothing of the daemon but the socket: what it believes about the
//! disk comes from the answers that it got. Several requests are in flight; reads are compared with the record
//! as they come. Started by the demo.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::future::{Either, pending, select};
use heliostat_block::buffer::Buffer;
use heliostat_block::clock::{Clock, Moment};
use heliostat_block::convert::usize_from;
use heliostat_block::nbd::client::{Allocation, Found, Negotiation, Wish};
use heliostat_block::nbd::client_reply::{Answer, Answered, Conversation};
use heliostat_block::nbd::client_request::Ask;
use heliostat_block::nbd::{Cookie, ReplyStyle};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};
use heliostat_host::clock::RealClock;
use heliostat_host::runtime::Thread;
use heliostat_host::socket::{Address, Socket};

use super::load::{Load, Wanted};
use super::pattern::{BLOCK, Pattern};
use super::record::{Change, Record};
use super::report::{Report, Timing};

/// A request that is not answered for so long counts as lost. Far beyond any pause that would be acceptable.
const PATIENCE: Duration = Duration::from_secs(30);

/// Received at once, at most: some answers of the longest reads.
const RECEIVE: usize = 256 << 10;

/// How a guest behaves.
#[derive(Clone, Debug)]
pub struct Habits {
    /// Where the export is.
    pub address: Address,
    /// Its name.
    pub export: String,
    /// Fixes its choices.
    pub seed: u64,
    /// What it writes.
    pub pattern: Pattern,
    /// Requests in flight at most.
    pub depth: usize,
    /// Requests a second.
    pub per_second: u32,
}

/// Why a guest gave up.
#[derive(Debug)]
pub enum GuestError {
    /// The connection failed, or was closed by the server.
    Connection(io::Error),
    /// The server broke the protocol, or would not give the export.
    Protocol(String),
    /// A request was not answered.
    NoAnswer(Duration),
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(error) => write!(f, "the guest lost its disk: {error}"),
            Self::Protocol(error) => {
                write!(f, "the guest and the server do not understand each other: {error}")
            }
            Self::NoAnswer(waited) => write!(f, "a request of the guest got no answer in {waited:?}"),
        }
    }
}

impl std::error::Error for GuestError {}

impl From<io::Error> for GuestError {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

/// What a running guest shares with who started it.
#[derive(Debug, Default)]
struct Board {
    stop: AtomicBool,
    answered: AtomicU64,
}

/// A running guest.
pub struct Guest {
    board: Arc<Board>,
    thread: Thread<Result<Report, GuestError>>,
}

impl Guest {
    /// Connects and begins. `record` says what the disk holds.
    ///
    /// # Errors
    /// When the host gives no thread. A connection that fails is said by [`Guest::stop`].
    pub fn start(habits: Habits, record: Record, clock: RealClock) -> io::Result<Self> {
        let board = Arc::new(Board::default());
        let seen = Arc::clone(&board);
        let thread = Thread::spawn("guest", move || async move {
            let client = Client::connect(&habits, record, clock, seen).await?;
            client.run().await
        })?;
        Ok(Self { board, thread })
    }

    /// Requests that have been answered so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.board.answered.load(Ordering::Relaxed)
    }

    /// Says whether it has ended by itself, which it does only when something is wrong.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Lets it wait for its answers, flush and leave.
    ///
    /// # Errors
    /// [`GuestError`], also one that ended it earlier.
    pub fn stop(self) -> Result<Report, GuestError> {
        self.board.stop.store(true, Ordering::Relaxed);
        self.thread.join()
    }
}

/// A request in flight.
struct Sent {
    what: What,
    at: Moment,
}

enum What {
    Change { request: u64, blocks: Range<u64> },
    Read(Range<u64>),
    Flush,
}

/// The guest's side of the connection.
struct Client {
    socket: Socket,
    conversation: Conversation,
    input: BytesMut,
    output: BytesMut,
    sent: BTreeMap<Cookie, Sent>,
    load: Load,
    pattern: Pattern,
    clock: RealClock,
    board: Arc<Board>,
    depth: usize,
    interval: Duration,
    next_due: Moment,
    report: Report,
}

impl Client {
    async fn connect(
        habits: &Habits,
        record: Record,
        clock: RealClock,
        board: Arc<Board>,
    ) -> Result<Self, GuestError> {
        let socket = Socket::connect(&habits.address).await?;
        let mut input = BytesMut::with_capacity(RECEIVE);
        let found = negotiate(&socket, &habits.export, &mut input).await?;
        Ok(Self {
            conversation: Conversation::new(&found),
            socket,
            input,
            output: BytesMut::new(),
            sent: BTreeMap::new(),
            load: Load::new(habits.seed, record.blocks()),
            pattern: habits.pattern,
            clock,
            board,
            depth: habits.depth.max(1),
            interval: Duration::from_secs(1) / habits.per_second.max(1),
            next_due: clock.now(),
            report: Report::new(record),
        })
    }

    async fn run(mut self) -> Result<Report, GuestError> {
        let mut says_goodbye = false;
        loop {
            let stopping = self.board.stop.load(Ordering::Relaxed);
            if !stopping {
                self.ask_what_is_due()?;
            } else if self.sent.is_empty() && !says_goodbye {
                says_goodbye = true;
                self.ask(Wanted::Flush)?;
            }
            send(&self.socket, &mut self.output)?;
            self.receive()?;
            if stopping && says_goodbye && self.sent.is_empty() {
                break;
            }
            self.wait(stopping).await?;
        }
        self.conversation.disconnect(&mut self.output);
        // The server has answered everything; whether it hears the goodbye makes no difference.
        let _ = send(&self.socket, &mut self.output);
        Ok(self.report)
    }

    fn ask_what_is_due(&mut self) -> Result<(), GuestError> {
        let now = self.clock.now();
        while self.sent.len() < self.depth && self.next_due <= now {
            let wanted = self.load.next();
            self.ask(wanted)?;
            // What was missed while all requests were waiting is not made up for: a guest does not hurry.
            self.next_due = (self.next_due + self.interval).max(now);
        }
        Ok(())
    }

    fn ask(&mut self, wanted: Wanted) -> Result<(), GuestError> {
        let at = self.clock.now();
        let durability = Durability::Cached;
        let (what, ask) = match wanted {
            Wanted::Write(blocks) => {
                let range = bytes_of(&blocks);
                (self.change(Change::Write, blocks, at), Ask::Write { range, durability })
            }
            Wanted::Zero(blocks) => {
                let range = bytes_of(&blocks);
                let what = self.change(Change::Zero, blocks, at);
                let (space, effort) = (ZeroSpace::MayUnmap, ZeroEffort::Any);
                (what, Ask::WriteZeroes { range, space, effort, durability })
            }
            Wanted::Trim(blocks) => {
                let range = bytes_of(&blocks);
                (self.change(Change::Trim, blocks, at), Ask::Trim { range })
            }
            Wanted::Read(blocks) => {
                let range = bytes_of(&blocks);
                let buffer = Buffer::zeroed(usize_from(range.len()));
                (What::Read(blocks), Ask::Read { offset: range.offset(), buffer })
            }
            Wanted::Flush => (What::Flush, Ask::Flush),
        };
        let cookie = self
            .conversation
            .ask(ask, &mut self.output)
            .map_err(|error| GuestError::Protocol(error.to_string()))?;
        if let What::Change { request, blocks } = &what
            && self.report.record.entries()[usize_from(request - 1)].change == Change::Write
        {
            append_data(self.pattern, blocks, *request, &mut self.output);
        }
        self.sent.insert(cookie, Sent { what, at });
        Ok(())
    }

    fn change(&mut self, change: Change, blocks: Range<u64>, at: Moment) -> What {
        let request = self.report.record.sent(change, blocks.clone(), at);
        What::Change { request, blocks }
    }

    fn receive(&mut self) -> Result<(), GuestError> {
        while fill(&self.socket, &mut self.input)? {
            let violation = |error: heliostat_block::nbd::Violation| GuestError::Protocol(error.to_string());
            while let Some(answer) = self.conversation.next(&mut self.input).map_err(violation)? {
                self.answered(answer)?;
            }
        }
        Ok(())
    }

    fn answered(&mut self, answer: Answer) -> Result<(), GuestError> {
        let now = self.clock.now();
        let unasked = || GuestError::Protocol("an answer to no request".to_owned());
        let sent = self.sent.remove(&answer.cookie).ok_or_else(unasked)?;
        self.report.timings.push(Timing { sent: sent.at, took: now.since(sent.at) });
        self.board.answered.fetch_add(1, Ordering::Relaxed);
        match (sent.what, answer.outcome) {
            (What::Change { request, blocks }, Ok(_)) => {
                self.report.record.acknowledged(request, now);
                self.load.release(&blocks);
            }
            (What::Read(blocks), Ok(Answered::Data(buffer))) => {
                self.check_read(&blocks, &buffer);
                self.load.release(&blocks);
            }
            (What::Flush, Ok(_)) => self.report.flushes += 1,
            (What::Read(_), Ok(_)) => return Err(GuestError::Protocol("a read without data".to_owned())),
            (what, Err(failure)) => {
                let name = match &what {
                    What::Change { request, blocks } => {
                        self.report.record.failed(*request);
                        self.load.release(blocks);
                        format!("request {request} at blocks {}..{}", blocks.start, blocks.end)
                    }
                    What::Read(blocks) => {
                        self.load.release(blocks);
                        format!("a read of blocks {}..{}", blocks.start, blocks.end)
                    }
                    What::Flush => "a flush".to_owned(),
                };
                let words = || format!("{name} failed: {:?} {}", failure.errno, failure.message);
                self.report.errors.add(words);
            }
        }
        Ok(())
    }

    /// No write to these blocks was in flight beside the read, so the record knows what must have come.
    fn check_read(&mut self, blocks: &Range<u64>, bytes: &[u8]) {
        self.report.reads += 1;
        for (block, bytes) in blocks.clone().zip(bytes.chunks(usize_from(BLOCK))) {
            let expected = self.report.record.expected(block);
            if expected.contents().iter().any(|content| self.pattern.holds(block, *content, bytes)) {
                continue;
            }
            let words = || format!("block {block}: read {}, not {expected}", self.pattern.recognise(bytes));
            self.report.false_reads.add(words);
        }
    }

    /// Waits for something to do: an answer, room to send, or the next request's time.
    async fn wait(&self, stopping: bool) -> Result<(), GuestError> {
        let now = self.clock.now();
        if let Some(oldest) = self.sent.values().map(|sent| sent.at).min()
            && now.since(oldest) > PATIENCE
        {
            return Err(GuestError::NoAnswer(now.since(oldest)));
        }
        let may_ask = !stopping && self.sent.len() < self.depth;
        // A guest that has nothing to do looks up now and then, to see that it is to stop.
        let until = if may_ask { self.next_due } else { now + Duration::from_millis(10) };
        let timer = self.clock.sleep_until(until);
        let writable = when(!self.output.is_empty(), self.socket.writable());
        let sockets = select(Box::pin(self.socket.readable()), Box::pin(writable));
        match select(sockets, timer).await {
            Either::Left((Either::Left((result, _)) | Either::Right((result, _)), _)) => Ok(result?),
            Either::Right(((), _)) => Ok(()),
        }
    }
}

/// The bytes of a range of blocks.
#[must_use]
pub fn bytes_of(blocks: &Range<u64>) -> ByteRange {
    ByteRange::from_bounds(blocks.start * BLOCK, blocks.end * BLOCK)
}

fn append_data(pattern: Pattern, blocks: &Range<u64>, request: u64, output: &mut BytesMut) {
    let start = output.len();
    output.resize(start + usize_from((blocks.end - blocks.start) * BLOCK), 0);
    for (block, bytes) in blocks.clone().zip(output[start..].chunks_mut(usize_from(BLOCK))) {
        pattern.fill(block, request, bytes);
    }
}

async fn when<T>(wanted: bool, future: impl Future<Output = T>) -> T {
    if wanted { future.await } else { pending().await }
}

/// Sends what there is room for.
fn send(socket: &Socket, output: &mut BytesMut) -> io::Result<()> {
    while !output.is_empty() {
        match socket.send_now(&[IoSlice::new(output)]) {
            Ok(count) => output.advance(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives what is there; answers whether that was anything.
fn fill(socket: &Socket, input: &mut BytesMut) -> io::Result<bool> {
    let start = input.len();
    input.resize(start + RECEIVE, 0);
    let received = socket.recv_now(&mut input[start..]);
    input.truncate(start + *received.as_ref().unwrap_or(&0));
    match received {
        Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

async fn negotiate(socket: &Socket, export: &str, input: &mut BytesMut) -> Result<Found, GuestError> {
    let wish =
        Wish { export: export.to_owned(), replies: ReplyStyle::Structured, allocation: Allocation::Unwanted };
    let mut negotiation = Negotiation::new(wish);
    let mut output = BytesMut::new();
    loop {
        let found =
            negotiation.step(input, &mut output).map_err(|error| GuestError::Protocol(error.to_string()))?;
        while !output.is_empty() {
            send(socket, &mut output)?;
            if !output.is_empty() {
                socket.writable().await?;
            }
        }
        if let Some(found) = found {
            return Ok(found);
        }
        if !fill(socket, input)? {
            socket.readable().await?;
        }
    }
}
