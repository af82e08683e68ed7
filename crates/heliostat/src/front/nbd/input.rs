//! What a connection has received and not understood yet. Called by the handshake and by the connection's loop.

use std::io;

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_host::stream::Stream;

use crate::serve::Buffers;

/// What one receive takes at most: 60 writes of 4 KiB, so that their cost is shared by many.
pub(super) const RECEIVE_LEN: usize = 256 << 10;

/// Appends what is there, at most `len` bytes, to `input`, which holds much less than [`RECEIVE_LEN`]. The
/// memory is taken from `spare`, and left there when nothing came.
pub(super) fn receive_now(
    stream: &Stream,
    buffers: &Buffers,
    spare: &mut Option<Buffer>,
    len: usize,
    input: &mut Bytes,
) -> io::Result<usize> {
    let mut buffer = spare.take().unwrap_or_else(|| buffers.take(RECEIVE_LEN));
    let kept = input.len();
    let end = buffer.len().min(kept + len);
    match stream.recv_now(&mut buffer[kept..end]) {
        Ok(received) => {
            buffer[..kept].copy_from_slice(input);
            buffer.truncate(kept + received);
            *input = buffer.freeze();
            Ok(received)
        }
        Err(error) => {
            *spare = Some(buffer);
            Err(error)
        }
    }
}
