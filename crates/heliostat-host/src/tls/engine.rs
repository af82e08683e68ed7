//! [`Engine`]: rustls between two blocks of records. Knows no socket; called by the stream.

use std::cell::RefCell;
use std::io::IoSlice;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus, WriteTraffic,
};

use super::block::Block;

/// The most plain bytes in a record.
const RECORD_LEN: usize = 16 << 10;

/// What a record may need beyond its bytes: header, nonce, tag, type, and a change of keys before it.
const RECORD_EXTRA: usize = 512;

thread_local! {
    /// Where short pieces are put together to one record.
    static GATHERED: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(RECORD_LEN));
}

/// One side of a TLS connection.
pub(super) enum Engine {
    Server(UnbufferedServerConnection),
    Client(UnbufferedClientConnection),
}

/// What the engine wants after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Another turn: it has done something.
    Again,
    /// More from the peer.
    Hungry,
    /// More from the peer, or something to send: so much was taken of what was offered.
    Ready(usize),
    /// The peer has said that nothing more comes.
    Closed,
}

/// What is to be said in a turn, if it may.
#[derive(Clone, Copy)]
pub(super) enum Say<'a> {
    Nothing,
    Data(&'a [IoSlice<'a>]),
    Goodbye,
}

/// Where decrypted bytes go: to the reader as far as it has room, else behind what waits for it.
pub(super) struct Sink<'a> {
    pub(super) buffer: &'a mut [u8],
    pub(super) filled: usize,
    pub(super) rest: &'a mut Vec<u8>,
}

impl Sink<'_> {
    fn take(&mut self, bytes: &[u8]) {
        let now = if self.rest.is_empty() { bytes.len().min(self.buffer.len() - self.filled) } else { 0 };
        self.buffer[self.filled..self.filled + now].copy_from_slice(&bytes[..now]);
        self.filled += now;
        self.rest.extend_from_slice(&bytes[now..]);
    }

    pub(super) const fn is_full(&self) -> bool {
        self.filled == self.buffer.len()
    }
}

impl Engine {
    /// Gets on by one record at most: takes it off the input, puts what it holds into the sink, what is to be
    /// sent into the output.
    ///
    /// # Errors
    /// What the peer did wrong; nothing goes on after it, but [`Engine::last_words`].
    pub(super) fn turn(
        &mut self,
        input: &mut Block,
        output: &mut Block,
        sink: &mut Sink<'_>,
        say: Say<'_>,
    ) -> Result<Turn, rustls::Error> {
        let records = if input.is_empty() { &mut [][..] } else { input.filled() };
        let (discard, turn) = match self {
            Self::Server(connection) => handle(connection.process_tls_records(records), output, sink, say),
            Self::Client(connection) => handle(connection.process_tls_records(records), output, sink, say),
        };
        input.discard(discard);
        turn
    }

    /// After an error: puts what the peer is to be told of it into the output. Looks at no record any more, since
    /// rustls must not be asked about one that it has refused.
    pub(super) fn last_words(&mut self, input: &mut Block, output: &mut Block) {
        let mut rest = Vec::new();
        let mut sink = Sink { buffer: &mut [], filled: 0, rest: &mut rest };
        while self.has_words() && self.turn(input, output, &mut sink, Say::Nothing).is_ok() {}
    }

    /// Whether a turn would only hand out what is to be sent.
    fn has_words(&self) -> bool {
        match self {
            Self::Server(connection) => connection.wants_write(),
            Self::Client(connection) => connection.wants_write(),
        }
    }

    pub(super) fn is_handshaking(&self) -> bool {
        match self {
            Self::Server(connection) => connection.is_handshaking(),
            Self::Client(connection) => connection.is_handshaking(),
        }
    }

    /// The certificate that the peer has shown, if any.
    pub(super) fn peer_certificate(&self) -> Option<&CertificateDer<'static>> {
        let certificates = match self {
            Self::Server(connection) => connection.peer_certificates(),
            Self::Client(connection) => connection.peer_certificates(),
        };
        certificates?.first()
    }
}

fn handle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    output: &mut Block,
    sink: &mut Sink<'_>,
    say: Say<'_>,
) -> (usize, Result<Turn, rustls::Error>) {
    let mut discard = status.discard;
    let turn = status.state.and_then(|state| match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                sink.take(record.payload);
            }
            Ok(Turn::Again)
        }
        ConnectionState::EncodeTlsData(mut data) => {
            if let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) =
                data.encode(output.tail()).map(|written| output.fill(written))
            {
                output.reserve(required_size);
                let written = data.encode(output.tail()).map_err(other)?;
                output.fill(written);
            }
            Ok(Turn::Again)
        }
        ConnectionState::TransmitTlsData(data) => {
            // It is in the output, and nothing overtakes it there.
            data.done();
            Ok(Turn::Again)
        }
        ConnectionState::BlockedHandshake => Ok(Turn::Hungry),
        ConnectionState::WriteTraffic(writer) => speak(writer, output, say).map(Turn::Ready),
        ConnectionState::PeerClosed | ConnectionState::Closed => Ok(Turn::Closed),
        _ => Err(rustls::Error::General("data before the handshake was over".to_owned())),
    });
    (discard, turn)
}

fn other(error: impl std::fmt::Display) -> rustls::Error {
    rustls::Error::General(error.to_string())
}

fn speak<Data>(
    mut writer: WriteTraffic<'_, Data>,
    output: &mut Block,
    say: Say<'_>,
) -> Result<usize, rustls::Error> {
    match say {
        Say::Nothing => Ok(0),
        Say::Goodbye => {
            output.reserve(RECORD_EXTRA);
            let written = writer.queue_close_notify(output.tail()).map_err(other)?;
            output.fill(written);
            Ok(0)
        }
        Say::Data(slices) => GATHERED.with_borrow_mut(|gathered| {
            let mut pieces = Pieces { slices, offset: 0 };
            let mut taken = 0;
            output.reserve(RECORD_LEN + RECORD_EXTRA);
            while output.tail().len() >= RECORD_LEN + RECORD_EXTRA {
                let record = pieces.next_record(gathered);
                if record.is_empty() {
                    break;
                }
                let written = writer.encrypt(record, output.tail()).map_err(|error| match error {
                    EncryptError::EncryptExhausted => rustls::Error::EncryptError,
                    error @ EncryptError::InsufficientSize(_) => other(error),
                })?;
                output.fill(written);
                taken += record.len();
            }
            Ok(taken)
        }),
    }
}

/// What is to be sent, cut into records.
struct Pieces<'a> {
    slices: &'a [IoSlice<'a>],
    /// How much of the first one was taken.
    offset: usize,
}

impl<'a> Pieces<'a> {
    /// The next bytes, a record's at most. Copied together only where no slice has enough of its own.
    fn next_record<'r>(&mut self, gathered: &'r mut Vec<u8>) -> &'r [u8]
    where
        'a: 'r,
    {
        gathered.clear();
        while let Some(slice) = self.slices.first() {
            let left = &slice[self.offset..];
            let now = left.len().min(RECORD_LEN - gathered.len());
            let is_through = now == left.len();
            let is_alone = gathered.is_empty() && (now == RECORD_LEN || is_through && self.slices.len() == 1);
            let bytes = &left[..now];
            if is_through {
                self.slices = &self.slices[1..];
                self.offset = 0;
            } else {
                self.offset += now;
            }
            if is_alone && !bytes.is_empty() {
                return bytes;
            }
            gathered.extend_from_slice(bytes);
            if gathered.len() == RECORD_LEN {
                break;
            }
        }
        gathered
    }
}
