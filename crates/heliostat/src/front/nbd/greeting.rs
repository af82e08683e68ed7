//! How a connection begins: the handshake on a socket, inside TLS where one side wants that.
//!
//! Serves no request. Bounded in time by its caller, the connection's task.

use std::io::{self, IoSlice};

use bytes::{Buf, Bytes, BytesMut};
use heliostat_block::nbd::handshake::{Agreed, Handshake, Offers, Step, TlsPolicy};
use heliostat_host::stream::Stream;

use super::exports::Client;
use super::input::{RECEIVE_LEN, receive_now};
use super::{ServerTls, Shared};
use crate::serve::Buffers;

/// Agrees with the client on an export, inside TLS where one of both wants that. `None` when the connection is to be
/// closed.
pub(super) async fn handshake(
    mut stream: Stream,
    shared: &Shared,
    input: &mut Bytes,
) -> Option<(Stream, Client, Agreed)> {
    let exports = &shared.exports;
    let mut output = BytesMut::new();
    let policy = shared.tls.as_ref().map_or(TlsPolicy::None, |tls| tls.policy);
    let mut handshake = Handshake::new(&mut output).with_tls(policy);
    loop {
        send_all(&stream, &mut output).await.ok()?;
        let (offered, offers) = exports.offers(stream.peer());
        let offers = Offers { exports: &offers, shutting_down: exports.is_stopping() };
        match handshake.step(input, offers, &mut output).ok()? {
            Step::Answered => {}
            Step::Incomplete => receive(&stream, &shared.buffers, input).await.ok()?,
            Step::StartTls => {
                send_all(&stream, &mut output).await.ok()?;
                stream = start_tls(stream, shared.tls.as_ref()?).await?;
            }
            Step::Agreed(agreed) => {
                let client = exports.enter(&offered[agreed.offer])?;
                send_all(&stream, &mut output).await.ok()?;
                return Some((stream, client, agreed));
            }
            Step::Aborted => {
                send_all(&stream, &mut output).await.ok()?;
                return None;
            }
        }
    }
}

/// Goes over to TLS. `None` when that fails, or who is there is not let in.
async fn start_tls(stream: Stream, tls: &ServerTls) -> Option<Stream> {
    let stream = stream.accept_tls(&tls.credentials).await.ok()?;
    tls.admits(stream.peer()).then_some(stream)
}

async fn send_all(stream: &Stream, output: &mut BytesMut) -> io::Result<()> {
    while !output.is_empty() {
        match stream.send_now(&[IoSlice::new(output)]) {
            Ok(sent) => output.advance(sent),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until something has come, and appends it to `input`. The end of the stream is an error.
async fn receive(stream: &Stream, buffers: &Buffers, input: &mut Bytes) -> io::Result<()> {
    let mut buffer = None;
    loop {
        match receive_now(stream, buffers, &mut buffer, RECEIVE_LEN, input) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            Err(error) => return Err(error),
        }
    }
}
