//! Servers whose answer to one request does not end.

use super::*;
use crate::buffer::Buffer;
use crate::convert::u64_from;
use crate::limits::{NBD_EXTENTS_LEN_MAX, NBD_FAILURES_MAX};
use crate::nbd::client::Found;
use crate::nbd::client_reply::Conversation;
use crate::nbd::client_request::Ask;
use crate::nbd::request::ExtentsWanted;
use crate::nbd::wire::{EXTENDED_REPLY_MAGIC, chunk};
use crate::range::ByteRange;

fn client() -> Conversation {
    let terms = Terms { allocation: Some(1), ..terms(ReplyStyle::Extended) };
    let mut client = Conversation::new(&Found { terms, flags: 1, description: String::new() });
    let mut output = BytesMut::new();
    client.ask(Ask::Read { offset: 0, buffer: Buffer::zeroed(512) }, &mut output).unwrap();
    let range = ByteRange::from_bounds(0, 4096);
    client.ask(Ask::BlockStatus { range, extents: ExtentsWanted::Many }, &mut output).unwrap();
    client
}

fn head(kind: u16, cookie: u64, len: usize) -> Vec<u8> {
    let (magic, len) = (EXTENDED_REPLY_MAGIC.to_be_bytes(), u64_from(len).to_be_bytes());
    [&magic[..], &[0, 0], &kind.to_be_bytes(), &cookie.to_be_bytes(), &[0; 8], &len].concat()
}

#[test]
fn errors_without_end_end_the_connection() {
    let mut client = client();
    let error = [head(chunk::ERROR, 1, 6), vec![0, 0, 0, 5, 0, 0]].concat();
    for _ in 0..NBD_FAILURES_MAX {
        assert!(matches!(client.next(&mut BytesMut::from(&error[..])), Ok(None)));
    }
    client.next(&mut BytesMut::from(&error[..])).unwrap_err();
}

#[test]
fn a_list_of_extents_that_is_longer_than_any_sane_one_ends_the_connection() {
    for (more, is_taken) in [(0, true), (1, false)] {
        let count = (NBD_EXTENTS_LEN_MAX - 8) / 16 + more;
        let mut bytes = head(chunk::BLOCK_STATUS_EXT, 2, 8 + 16 * count);
        bytes.extend([0, 0, 0, 1]);
        bytes.extend(u32::try_from(count).unwrap().to_be_bytes());
        let taken = client().next(&mut BytesMut::from(&bytes[..]));
        assert_eq!(taken.is_ok(), is_taken, "{count} extents");
    }
}
