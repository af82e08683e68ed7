//! A link and our own server, over connections that are cut at every byte.

use bytes::BytesMut;
use proptest::prelude::*;

use super::*;
use crate::convert::{u64_from, usize_from};
use crate::nbd::Offer;
use crate::nbd::client::{Allocation, Negotiation, Wish};
use crate::nbd::handshake::{Handshake, Offers, Step};
use crate::nbd::reply::Replies;
use crate::nbd::request::{Parsed, Requests};
use crate::nbd::tests::{Disk, drain, offer, receive, requests};
use crate::storage::{ZeroEffort, ZeroSpace};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToServer,
    ToClient,
}

/// A connection is lost when so many bytes have gone that way, on any.
#[derive(Clone, Copy, Debug)]
struct Cut(Way, usize);

struct Connection {
    negotiation: Option<Negotiation>,
    handshake: Handshake,
    server: Option<(Requests, Replies)>,
    server_input: Bytes,
    client_input: BytesMut,
    /// What each side has said and has not gone yet.
    said: [BytesMut; 2],
}

struct World {
    link: Link,
    connections: Vec<Option<Connection>>,
    disk: Disk,
    now: Moment,
    cuts: Vec<Cut>,
    /// The most that goes at once.
    step: usize,
    gone: [usize; 2],
    replies: ReplyStyle,
}

impl World {
    fn new(connections: usize, cuts: Vec<Cut>, step: usize, replies: ReplyStyle) -> Self {
        Self {
            link: Link::new(settings(1 << 40, connections), Moment::START),
            connections: (0..connections).map(|_| None).collect(),
            disk: Disk(vec![0; usize_from(SIZE)]),
            now: Moment::START,
            cuts,
            step,
            gone: [0; 2],
            replies,
        }
    }

    /// Goes on until all requests have ended. Answers what came of them, in their order.
    fn settle(&mut self) -> Vec<Result<Answered, LinkError>> {
        let mut all = Vec::new();
        for _ in 0..200_000 {
            while let Some(line) = self.link.next_to_connect(self.now) {
                self.connections[line] = Some(Connection::new(self.replies));
            }
            self.link.hand_out(self.now);
            for line in 0..self.connections.len() {
                self.turn(line);
            }
            all.extend(std::iter::from_fn(|| self.link.next_ended()));
            if self.link.in_flight() == 0 {
                all.sort_by_key(|(ticket, _)| *ticket);
                assert!(all.windows(2).all(|pair| pair[0].0 != pair[1].0), "answered twice");
                return all.into_iter().map(|(_, outcome)| outcome).collect();
            }
            self.now = self.now + Duration::from_millis(1);
        }
        panic!("it does not come to its end");
    }

    /// What may go on a connection now: how much of `len` bytes, and whether it is cut then.
    fn carry(&mut self, way: Way, len: usize) -> (usize, bool) {
        let mut len = len.min(self.step);
        let gone = &mut self.gone[usize::from(way == Way::ToClient)];
        let cut = self.cuts.iter().position(|cut| cut.0 == way && cut.1 <= *gone + len);
        if let Some(cut) = cut {
            len = self.cuts.remove(cut).1.saturating_sub(*gone).min(len);
        }
        *gone += len;
        (len, cut.is_some())
    }

    fn turn(&mut self, line: usize) {
        let Some(mut connection) = self.connections[line].take() else { return };
        let offers = offers();
        let offers = Offers { exports: &offers, shutting_down: false };
        if let Some(outbox) = self.link.outbox(line) {
            let count = outbox.show(|slices| {
                slices.iter().for_each(|slice| connection.said[0].extend_from_slice(slice));
                slices.iter().map(|slice| slice.len()).sum()
            });
            outbox.sent(count);
        }
        let (len, to_server_cut) = self.carry(Way::ToServer, connection.said[0].len());
        let bytes = connection.said[0].split_to(len);
        connection.serve(&bytes, offers, &mut self.disk);
        let (len, to_client_cut) = self.carry(Way::ToClient, connection.said[1].len());
        let bytes = connection.said[1].split_to(len);
        let is_cut = to_server_cut || to_client_cut;
        if connection.negotiation.is_some() {
            let found = connection.negotiate(&bytes);
            match found {
                _ if is_cut => return self.link.connect_failed(line, "cut".to_owned(), self.now, 0),
                Some(found) => self.link.connected(line, found, self.now, 0).unwrap(),
                None => {}
            }
        } else {
            self.hear(line, &mut connection, &bytes);
            if is_cut {
                self.link.cut(line, "cut", self.now, 0);
                return self.connections.iter_mut().for_each(|other| *other = None);
            }
        }
        self.connections[line] = Some(connection);
    }

    fn hear(&mut self, line: usize, connection: &mut Connection, mut bytes: &[u8]) {
        while connection.client_input.is_empty() && !bytes.is_empty() {
            let Some(room) = self.link.payload_room(line) else { break };
            let now = room.len().min(bytes.len());
            room[..now].copy_from_slice(&bytes[..now]);
            self.link.payload_received(line, now);
            bytes = &bytes[now..];
        }
        connection.client_input.extend_from_slice(bytes);
        let input = connection.client_input.split();
        let mut rest = &input[..];
        self.link.receive(line, &mut rest).unwrap();
        connection.client_input.extend_from_slice(rest);
    }
}

fn offers() -> [Offer; 1] {
    [Offer { size: SIZE, ..offer("a") }]
}

impl Connection {
    fn new(replies: ReplyStyle) -> Self {
        let wish = Wish { export: "a".to_owned(), replies, allocation: Allocation::Wanted };
        let mut said = [BytesMut::new(), BytesMut::new()];
        Self {
            negotiation: Some(Negotiation::new(wish)),
            handshake: Handshake::new(&mut said[1]),
            server: None,
            server_input: Bytes::new(),
            client_input: BytesMut::new(),
            said,
        }
    }

    /// The server takes `bytes` in, and does all that it can.
    fn serve(&mut self, bytes: &[u8], offers: Offers<'_>, disk: &mut Disk) {
        receive(&mut self.server_input, bytes);
        while self.server.is_none() {
            match self.handshake.step(&mut self.server_input, offers, &mut self.said[1]).unwrap() {
                Step::Agreed(agreed) => self.server = Some(requests(agreed.terms)),
                Step::Answered => {}
                _ => return,
            }
        }
        if let Some((requests, replies)) = &mut self.server {
            while let Parsed::Request(request) = requests.next(&mut self.server_input, u64::MAX).unwrap() {
                disk.carry_out(request);
            }
            self.said[1].extend_from_slice(&drain(replies));
        }
    }

    fn negotiate(&mut self, bytes: &[u8]) -> Option<Found> {
        self.client_input.extend_from_slice(bytes);
        let negotiation = self.negotiation.as_mut()?;
        let found = negotiation.step(&mut self.client_input, &mut self.said[0]).unwrap();
        let found = found.map(|found| Found { flags: found.flags | flag::CAN_MULTI_CONN, ..found });
        if found.is_some() {
            self.negotiation = None;
        }
        found
    }
}

/// Several requests at a time that do not touch each other, all kinds of them; what they did is looked at in the end.
fn converse(world: &mut World, long: usize) -> Vec<u8> {
    let data = |seed: u8, len: usize| -> Bytes {
        (0..len).map(|n| u8::try_from(n % 250).unwrap() ^ seed).collect::<Vec<_>>().into()
    };
    let mut expected = vec![0; usize_from(SIZE)];
    let mut put = |offset: usize, data: &[u8]| expected[offset..offset + data.len()].copy_from_slice(data);
    let (first, second, third) = (data(1, 700), data(2, long), data(3, 10));
    let (cached, fua) = (Durability::Cached, Durability::Fua);
    for (offset, data, durability) in [(0, &first, cached), (1000, &second, cached), (60_000, &third, fua)] {
        world.link.submit(Wanted::Write { offset, data: data.clone().into(), durability });
        put(usize_from(offset), data);
    }
    assert!(world.settle().iter().all(Result::is_ok));
    let range = ByteRange::from_bounds(100, 300);
    let (space, effort) = (ZeroSpace::Keep, ZeroEffort::Any);
    world.link.submit(Wanted::WriteZeroes { range, space, effort, durability: cached });
    world.link.submit(Wanted::Trim { range: ByteRange::from_bounds(60_000, 60_004) });
    world.link.submit(Wanted::Flush);
    put(100, &[0; 200]);
    put(60_000, &[0; 4]);
    assert!(world.settle().iter().all(Result::is_ok));
    let reads = [(0, 1200), (59_990, 40)];
    for (offset, len) in reads {
        world.link.submit(Wanted::Read { offset, buffer: Buffer::zeroed(len) });
    }
    world.link.submit(Wanted::BlockStatus { range: ByteRange::from_bounds(0, SIZE) });
    let mut answers = world.settle().into_iter();
    for (offset, len) in reads {
        let Some(Ok(Answered::Data(read))) = answers.next() else { panic!("no data") };
        let offset = usize_from(offset);
        assert!(read[..] == expected[offset..offset + len], "a read at {offset}");
    }
    let Some(Ok(Answered::Extents(extents))) = answers.next() else { panic!("no extents") };
    assert_eq!(extents.last().unwrap().range.end(), SIZE);
    expected
}

/// The styles in which our server answers a request about the layout.
const STYLES: [ReplyStyle; 2] = [ReplyStyle::Structured, ReplyStyle::Extended];

#[test]
fn a_connection_cut_at_any_byte_costs_no_answer_and_no_data() {
    for style in STYLES {
        let mut whole = World::new(1, Vec::new(), usize::MAX, style);
        let expected = converse(&mut whole, 500);
        assert!(whole.disk.0 == expected);
        assert_eq!(whole.link.status(whole.now).reconnects, 0);
        for (way, total) in [(Way::ToServer, whole.gone[0]), (Way::ToClient, whole.gone[1])] {
            for at in 1..=total {
                let step = if at % 2 == 0 { 7 } else { usize::MAX };
                let mut world = World::new(1, vec![Cut(way, at)], step, style);
                assert!(converse(&mut world, 500) == expected, "{style:?} {way:?} cut at {at}");
                assert!(world.disk.0 == expected, "{style:?} {way:?} cut at {at}");
                assert!(world.cuts.is_empty(), "{style:?} {way:?} cut at {at}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn many_cuts_on_several_connections_cost_no_answer_and_no_data(
        connections in 1_usize..4,
        cuts in prop::collection::vec((any::<bool>(), 0_usize..60_000), 0..12),
        step in prop::sample::select(vec![1_usize, 100, 5000, usize::MAX]),
        style in prop::sample::select(&STYLES[..]),
        long in prop::sample::select(vec![1_usize, 600, 40_000]),
    ) {
        let cuts = cuts.into_iter();
        let cuts = cuts.map(|(way, at)| Cut(if way { Way::ToServer } else { Way::ToClient }, at)).collect();
        let mut world = World::new(connections, cuts, if long > 10_000 { step.max(5000) } else { step }, style);
        let expected = converse(&mut world, long);
        prop_assert!(world.disk.0 == expected);
        prop_assert_eq!(u64_from(world.disk.0.len()), SIZE);
    }
}
