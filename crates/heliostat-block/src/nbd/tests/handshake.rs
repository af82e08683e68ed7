//! The handshake, as a server and as a client.

use bytes::{BufMut, Bytes, BytesMut};

use super::*;
use crate::limits::{NBD_OPTION_LEN_MAX, NBD_OPTIONS_MAX};
use crate::nbd::wire::{info, opt, rep, transmission_flag as flag};

/// The types alone.
fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|(kind, _)| *kind).collect()
}

fn infos(replies: &[(u32, Vec<u8>)]) -> Vec<u16> {
    let infos = replies.iter().filter(|(kind, _)| *kind == rep::INFO);
    infos.map(|(_, data)| u16::from_be_bytes([data[0], data[1]])).collect()
}

#[test]
fn the_greeting_is_what_the_document_says() {
    let mut output = BytesMut::new();
    let _ = Handshake::new(&mut output);
    assert_eq!(&output[..], b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn unknown_client_flags_end_the_connection() {
    for flags in [4_u32, 1 << 31, u32::MAX] {
        let mut output = BytesMut::new();
        let mut handshake = Handshake::new(&mut output);
        let mut input = Bytes::copy_from_slice(&flags.to_be_bytes());
        let offers = Offers { exports: &[], shutting_down: false };
        assert_eq!(handshake.step(&mut input, offers, &mut output), Err(Violation::ClientFlags(flags)));
        assert_eq!(handshake.step(&mut input, offers, &mut output), Err(Violation::AfterEnd));
    }
}

#[test]
fn options_are_answered_with_the_replies_of_the_document() {
    let exports = [offer("a"), offer("b")];
    let table: &[(&str, u32, Vec<u8>, &[u32])] = &[
        ("a list", opt::LIST, vec![], &[rep::SERVER, rep::SERVER, rep::ACK]),
        ("a list with data", opt::LIST, vec![0], &[rep::ERR_INVALID]),
        ("structured replies", opt::STRUCTURED_REPLY, vec![], &[rep::ACK]),
        ("structured replies with data", opt::STRUCTURED_REPLY, vec![1, 2], &[rep::ERR_INVALID]),
        ("TLS", opt::STARTTLS, vec![], &[rep::ERR_POLICY]),
        ("extended headers", opt::EXTENDED_HEADERS, vec![], &[rep::ACK]),
        ("extended headers with data", opt::EXTENDED_HEADERS, vec![0], &[rep::ERR_INVALID]),
        ("an option that nobody knows", 0xdead_beef, vec![1; 100], &[rep::ERR_UNSUP]),
        ("info", opt::INFO, query_bytes("a", &[]), &[rep::INFO, rep::ACK]),
        ("info of no export", opt::INFO, query_bytes("c", &[]), &[rep::ERR_UNKNOWN]),
        ("info of a default that is none", opt::INFO, query_bytes("", &[]), &[rep::ERR_UNKNOWN]),
        ("info without data", opt::INFO, vec![], &[rep::ERR_INVALID]),
        ("info with a name that is too long", opt::INFO, vec![0, 0, 0, 9, b'a', 0, 0], &[rep::ERR_INVALID]),
        (
            "info with fewer requests than said",
            opt::INFO,
            query_bytes("a", &[0])[..7].into(),
            &[rep::ERR_INVALID],
        ),
        (
            "info with something behind",
            opt::INFO,
            [query_bytes("a", &[]), vec![0]].concat(),
            &[rep::ERR_INVALID],
        ),
        ("info with a name that is not UTF-8", opt::INFO, vec![0, 0, 0, 1, 0xff, 0, 0], &[rep::ERR_INVALID]),
        ("info with NUL in the name", opt::INFO, vec![0, 0, 0, 1, 0, 0, 0], &[rep::ERR_INVALID]),
        (
            "info with a name of 4097 bytes",
            opt::INFO,
            query_bytes(&"a".repeat(4097), &[]),
            &[rep::ERR_INVALID],
        ),
        ("info with an unknown request", opt::INFO, query_bytes("a", &[99]), &[rep::INFO, rep::ACK]),
        ("go to no export", opt::GO, query_bytes("c", &[]), &[rep::ERR_UNKNOWN]),
        ("all contexts", opt::LIST_META_CONTEXT, context_bytes("a", &[]), &[4, 4, 4, rep::ACK]),
        (
            "the base contexts",
            opt::LIST_META_CONTEXT,
            context_bytes("a", &["base:"]),
            &[rep::META_CONTEXT, rep::ACK],
        ),
        ("another's contexts", opt::LIST_META_CONTEXT, context_bytes("a", &["x-other:"]), &[rep::ACK]),
        ("QEMU's contexts", opt::LIST_META_CONTEXT, context_bytes("a", &["qemu:"]), &[4, 4, rep::ACK]),
        ("contexts of no export", opt::LIST_META_CONTEXT, context_bytes("c", &[]), &[rep::ERR_UNKNOWN]),
        (
            "fewer queries than said",
            opt::LIST_META_CONTEXT,
            vec![0, 0, 0, 1, b'a', 0, 0, 0, 1],
            &[rep::ERR_INVALID],
        ),
    ];
    for (what, option, data, expected) in table {
        assert_eq!(kinds(&Server::new(&exports).ask(*option, data)), *expected, "{what}");
    }
}

#[test]
fn an_info_holds_what_was_asked_for() {
    let exports = [offer("a")];
    let mut server = Server::new(&exports);
    let replies = server.ask(opt::INFO, &query_bytes("", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]));
    assert_eq!(infos(&replies), [info::EXPORT, info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]);
    let flags = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::SEND_TRIM
        | flag::SEND_WRITE_ZEROES
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE
        | flag::SEND_FAST_ZERO;
    assert_eq!(replies[0].1, [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat());
    assert_eq!(replies[1].1, b"\x00\x01a");
    assert_eq!(replies[2].1, b"\x00\x02disk a");
    assert_eq!(replies[3].1, [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
}

#[test]
fn flags_follow_the_access_and_the_replies() {
    let exports = [Offer { access: Access::ReadOnly, ..offer("a") }];
    let mut server = Server::new(&exports);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    let replies = server.ask(opt::INFO, &query_bytes("a", &[]));
    let flags = u16::from_be_bytes([replies[0].1[10], replies[0].1[11]]);
    assert_eq!(flags & (flag::READ_ONLY | flag::SEND_DF), flag::READ_ONLY | flag::SEND_DF);
    assert_eq!(flags & (flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO), 0);
}

#[test]
fn stricter_sizes_are_told_unasked_and_nobody_is_turned_away() {
    let exports = [Offer { block_sizes: BlockSizes::new(4096, 4096, 1 << 25), ..offer("a") }];
    let mut server = Server::new(&exports);
    assert_eq!(infos(&server.ask(opt::INFO, &query_bytes("a", &[]))), [info::EXPORT, info::BLOCK_SIZE]);
    assert_eq!(server.go("a").terms.block_sizes.minimum(), 4096);
}

#[test]
fn a_listing_names_and_describes_each_export() {
    let exports = [offer("first"), Offer { description: String::new(), ..offer("second") }];
    let replies = Server::new(&exports).ask(opt::LIST, &[]);
    assert_eq!(replies[0].1, b"\x00\x00\x00\x05firstdisk first");
    assert_eq!(replies[1].1, b"\x00\x00\x00\x06second");
}

#[test]
fn the_empty_name_is_the_only_export_or_the_marked_one() {
    let (a, b) = (offer("a"), Offer { is_default: true, ..offer("b") });
    assert_eq!(Server::new(std::slice::from_ref(&a)).go("").offer, 0);
    assert_eq!(Server::new(&[a.clone(), b.clone()]).go("").offer, 1);
    assert_eq!(Server::new(&[a, offer(""), b]).go("").offer, 1, "one with that very name comes first");
}

#[test]
fn export_name_is_answered_with_zeroes_unless_refused() {
    let exports = [offer("a")];
    for (client_flags, len) in [(1_u32, 10 + 124), (3, 10)] {
        let mut output = BytesMut::new();
        let mut handshake = Handshake::new(&mut output);
        output.clear();
        let mut input = Bytes::copy_from_slice(&client_flags.to_be_bytes());
        receive(&mut input, &option_bytes(opt::EXPORT_NAME, b"a"));
        let offers = Offers { exports: &exports, shutting_down: false };
        assert_eq!(handshake.step(&mut input, offers, &mut output), Ok(Step::Answered));
        assert!(matches!(handshake.step(&mut input, offers, &mut output), Ok(Step::Agreed(_))));
        assert_eq!(output.len(), len);
        assert_eq!(output[..8], SIZE.to_be_bytes());
    }
}

#[test]
fn export_name_of_no_export_ends_the_connection() {
    let exports = [offer("a")];
    for name in [&b"c"[..], b"\xff", &[b'a'; NBD_OPTION_LEN_MAX + 1]] {
        let mut server = Server::new(&exports);
        assert_eq!(server.send(opt::EXPORT_NAME, name), Err(Violation::UnknownExport));
        assert!(server.output.is_empty());
    }
}

#[test]
fn abort_is_acknowledged_whatever_it_carries() {
    let mut server = Server::new(&[]);
    assert_eq!(server.send(opt::ABORT, b"bye"), Ok(Step::Aborted));
    assert_eq!(kinds(&server.replies(opt::ABORT)), [rep::ACK]);
}

#[test]
fn a_server_that_goes_away_refuses_all_but_abort() {
    let exports = [offer("a")];
    for option in [opt::LIST, opt::GO, opt::STRUCTURED_REPLY, 77] {
        let mut server = Server::new(&exports);
        server.offers.shutting_down = true;
        assert_eq!(kinds(&server.ask(option, &query_bytes("a", &[]))), [rep::ERR_SHUTDOWN]);
        assert_eq!(server.send(opt::ABORT, &[]), Ok(Step::Aborted));
    }
}

#[test]
fn block_status_needs_a_context_selected_for_the_same_export() {
    let exports = [offer("a"), offer("b")];
    let mut server = Server::new(&exports);
    let set = opt::SET_META_CONTEXT;
    assert_eq!(kinds(&server.ask(set, &context_bytes("a", &["base:allocation"]))), [rep::ERR_INVALID]);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    let replies = server.ask(set, &context_bytes("a", &["x-y:z", "base:", "base:allocation"]));
    assert_eq!(kinds(&replies), [rep::META_CONTEXT, rep::ACK]);
    assert_eq!(replies[0].1, [&[0, 0, 0, 1][..], b"base:allocation"].concat());
    let agreed = server.go("a");
    assert_eq!(agreed.terms.allocation, Some(1));
    assert_eq!(agreed.terms.replies, ReplyStyle::Structured);
}

#[test]
fn a_context_is_lost_by_another_export_or_a_later_selection() {
    let exports = [offer("a"), offer("b")];
    let select = context_bytes("a", &["base:allocation"]);
    let table: &[(&str, Vec<Vec<u8>>, &str)] = &[
        ("another export", vec![select.clone()], "b"),
        ("an empty selection", vec![select.clone(), context_bytes("a", &[])], "a"),
        ("a wildcard, which selects nothing", vec![context_bytes("a", &["base:"])], "a"),
        ("a failed selection", vec![select.clone(), vec![1]], "a"),
        ("a selection for no export", vec![select, context_bytes("c", &["base:allocation"])], "a"),
    ];
    for (what, selections, name) in table {
        let mut server = Server::new(&exports);
        server.ask(opt::STRUCTURED_REPLY, &[]);
        selections.iter().for_each(|data| drop(server.ask(opt::SET_META_CONTEXT, data)));
        assert_eq!(server.go(name).terms.allocation, None, "{what}");
    }
}

#[test]
fn an_option_that_is_too_long_is_passed_over_and_refused() {
    let exports = [offer("a")];
    let mut server = Server::new(&exports);
    let mut input = option_bytes(opt::GO, &vec![0; NBD_OPTION_LEN_MAX + 1]).freeze();
    receive(&mut input, &option_bytes(opt::LIST, &[]));
    while !input.is_empty() {
        server.handshake.step(&mut input, server.offers, &mut server.output).unwrap();
    }
    let go = server.output.split_to(20 + "the option is too long".len());
    assert_eq!(go[12..16], rep::ERR_TOO_BIG.to_be_bytes());
    assert_eq!(kinds(&server.replies(opt::LIST)), [rep::SERVER, rep::ACK]);
}

#[test]
fn a_handshake_without_end_is_ended() {
    let mut server = Server::new(&[]);
    for _ in 0..NBD_OPTIONS_MAX {
        server.ask(opt::LIST, &[]);
    }
    assert!(matches!(server.send(opt::LIST, &[]), Err(Violation::HandshakeBound(_, "options"))));
    let mut server = Server::new(&[]);
    let mut header = option_bytes(77, &[]);
    header.truncate(12);
    header.put_u32(u32::MAX);
    let end = server.handshake.step(&mut header.freeze(), server.offers, &mut server.output);
    assert!(matches!(end, Err(Violation::HandshakeBound(_, "bytes"))));
}

#[test]
fn garbage_instead_of_an_option_ends_the_connection() {
    let mut server = Server::new(&[]);
    let mut input = Bytes::from_static(&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..]);
    let end = server.handshake.step(&mut input, server.offers, &mut server.output);
    assert!(matches!(end, Err(Violation::Magic { .. })));
}
