//! Answers that are sent from where they lie.

use std::sync::Arc;

use futures_util::FutureExt;

use super::*;
use crate::buffer::Buffer;
use crate::job::test_disk::{Disk, node_of};
use crate::nbd::Cookie;
use crate::node::Node;
use crate::span::Span;

/// A node of 2048 bytes, and a span that stands for 700 of its bytes.
fn span() -> (Arc<Node>, Span) {
    let node = node_of("disk0", Disk::of(vec![1; 2048]), &Arc::default());
    (node, Span::new(Arc::new("somewhere"), 100, 700))
}

/// Answers with a span: before it a reply is owed that has been given, behind it comes another.
fn answers_with(span: &Span, node: &Arc<Node>, style: ReplyStyle) -> Replies {
    let replies = Replies::new(&terms(style));
    let reply = replies.owe(Cookie(1), 100);
    assert!(!reply.takes_span(), "nobody has said that it can be sent");
    replies.take_spans();
    assert!(reply.takes_span());
    let tracked = node.enter().now_or_never().expect("the gate is open");
    reply.span(100, span.clone(), tracked);
    let next = replies.owe(Cookie(2), 0);
    assert!(!next.takes_span(), "something waits before it");
    next.done();
    replies
}

/// Sends all of it in steps; of a span it says what would lie there if each byte told its place.
fn drain_in_steps(replies: &Replies, step: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !replies.is_empty() {
        let now = match replies.span() {
            Some(span) => {
                let now = span.len().min(step);
                bytes.extend((span.offset()..).take(now).map(|at| u8::try_from(at % 251).unwrap()));
                now
            }
            None => replies.show(|slices| {
                let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                bytes.extend(&all[..all.len().min(step)]);
                all.len().min(step)
            }),
        };
        replies.sent(now);
    }
    bytes
}

fn bring(span: &Span) -> std::io::Result<Buffer> {
    let bytes: Vec<u8> =
        (span.offset()..).take(span.len()).map(|at| u8::try_from(at % 251).unwrap()).collect();
    Ok(Buffer::copy_of(&bytes))
}

#[test]
fn a_span_is_sent_in_any_pieces_as_what_was_read_would_be() {
    let (node, span) = span();
    for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
        let expected = Replies::new(&terms(style));
        expected.owe(Cookie(1), 100).data(100, bring(&span).unwrap());
        expected.owe(Cookie(2), 0).done();
        let expected = drain(&expected);
        for step in [1, 7, 64, 699, 5000] {
            let replies = answers_with(&span, &node, style);
            assert_eq!(replies.len(), expected.len());
            assert_eq!(drain_in_steps(&replies, step), expected, "{style:?} in steps of {step}");
            assert_eq!(node.in_flight(), 0);
        }
    }
}

#[test]
fn the_request_of_a_span_is_in_flight_until_that_is_sent_or_read() {
    let (node, span) = span();
    let replies = answers_with(&span, &node, ReplyStyle::Structured);
    let expected = drain_in_steps(&answers_with(&span, &node, ReplyStyle::Structured), 5000);
    assert_eq!(node.in_flight(), 1);
    let mut bytes = replies.show(|slices| slices[0].to_vec());
    assert_eq!(bytes.len(), 28, "the header, and no byte of what follows it");
    replies.sent(28);
    let begun = replies.span().unwrap();
    bytes.extend_from_slice(&bring(&begun).unwrap()[..300]);
    replies.sent(300);
    assert_eq!(node.in_flight(), 1, "400 bytes are left");
    assert!(replies.bring_in(|_| Err(std::io::ErrorKind::UnexpectedEof.into())).is_err());
    assert_eq!(node.in_flight(), 1);
    replies.bring_in(bring).unwrap();
    assert_eq!(node.in_flight(), 0);
    assert!(replies.span().is_none());
    bytes.extend(drain(&replies));
    assert_eq!(bytes, expected);
}
