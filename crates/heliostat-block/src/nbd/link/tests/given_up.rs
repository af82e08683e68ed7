//! A server that takes connections and answers nothing, given up once and again and again.

use super::*;
use crate::limits::GIVE_UP_GRACE;

/// Cuts what is overdue, as whoever carries the link out does. Says whether something was.
fn cut_overdue(link: &mut Link, now: Moment) -> bool {
    let overdue = link.overdue(now);
    overdue.iter().for_each(|line| link.cut(*line, "given up", now, 0));
    link.hand_out(now);
    !overdue.is_empty()
}

fn grace() -> u64 {
    u64::try_from(GIVE_UP_GRACE.as_millis()).unwrap()
}

#[test]
fn giving_up_again_and_again_postpones_nothing() {
    let mut link = up(60_000, 2);
    let first = link.submit(Wanted::Flush);
    link.hand_out(at(0));
    let mut later = None;
    for now in 0..grace() {
        link.give_up(at(now));
        assert!(!cut_overdue(&mut link, at(now)), "{now}");
        if now == 10 {
            later = Some(link.submit(Wanted::Flush));
        }
    }
    assert_eq!(link.wakes_at(), Some(at(grace())));
    assert!(cut_overdue(&mut link, at(grace())));
    let ended: Vec<_> =
        ended(&mut link).into_iter().map(|(ticket, outcome)| (ticket, outcome.is_ok())).collect();
    assert_eq!(ended, [(first, false), (later.unwrap(), false)]);
}

#[test]
fn a_server_that_only_ever_shakes_hands_keeps_nobody_who_gives_up_at_each_tick() {
    let mut link = up(60_000, 1);
    let mut now = 0;
    for _ in 0..20 {
        let ticket = link.submit(write(0, Durability::Cached));
        let posted = now;
        while link.in_flight() > 0 {
            link.give_up(at(now));
            cut_overdue(&mut link, at(now));
            reconnect(&mut link, at(now), &found());
            link.hand_out(at(now));
            now += 10;
            assert!(now - posted <= 2 * grace() + 20, "{ticket:?} waits still");
        }
        assert!(matches!(ended(&mut link)[..], [(_, Err(LinkError::Lost(_)))]));
    }
}

#[test]
fn a_server_that_answers_is_not_cut_though_it_is_given_up_at_each_tick() {
    let mut link = up(60_000, 1);
    link.submit(Wanted::Flush);
    // There is always one in flight, answered 100 ms after it was asked for.
    for cookie in 1..100 {
        link.submit(Wanted::Flush);
        for tick in 0..5 {
            let now = at(cookie * 50 + tick * 10);
            link.give_up(now);
            assert!(!cut_overdue(&mut link, now));
        }
        answer(&mut link, 0, cookie);
    }
    assert!(ended(&mut link).iter().all(|(_, outcome)| outcome.is_ok()));
    assert_eq!(link.status(at(5000)).reconnects, 0);
}

#[test]
fn a_read_that_is_let_go_ends_at_once_and_is_neither_sent_again_nor_missed() {
    let mut link = up(60_000, 1);
    let read = |link: &mut Link| link.submit(Wanted::Read { offset: 0, buffer: Buffer::zeroed(512) });
    let [on_its_way, other] = [read(&mut link), read(&mut link)];
    link.hand_out(at(0));
    let waiting = read(&mut link);
    for ticket in [on_its_way, waiting, waiting] {
        link.let_go(ticket);
    }
    let gone: Vec<_> = ended(&mut link).into_iter().map(|(ticket, _)| ticket).collect();
    assert_eq!((gone, link.in_flight()), (vec![on_its_way, waiting], 1));
    // The answers come after all, in their order.
    let mut bytes = Vec::new();
    for cookie in [1_u64, 2] {
        bytes.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(cookie.to_be_bytes());
        bytes.extend([9; 512]);
    }
    link.receive(0, &mut &bytes[..]).unwrap();
    assert_eq!(ended(&mut link), [(other, Ok(()))]);
    // What is let go and lost with its connection is not sent again.
    let lost = read(&mut link);
    link.hand_out(at(1));
    link.let_go(lost);
    link.cut(0, "gone", at(2), 0);
    assert_eq!((link.in_flight(), link.queue.len()), (0, 0));
}
