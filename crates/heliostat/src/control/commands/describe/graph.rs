//! `x-debug-query-block-graph`: nodes, who uses them, and what each of those may do and lets others do.
//!
//! Computed from what the daemon knows, by QEMU's rules: what a user of a node needs is handed down to the nodes below.

use std::collections::BTreeMap;
use std::sync::Arc;

use heliostat_block::graph::Role;
use serde_json::{Value, json};

use super::find;
use crate::daemon::{Daemon, JobEntry, NodeEntry};

/// What somebody may do, or lets others do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rights {
    consistent_read: bool,
    write: bool,
    write_unchanged: bool,
    resize: bool,
}

impl Rights {
    const ALL: Self = Self { consistent_read: true, write: true, write_unchanged: true, resize: true };
    const NONE: Self = Self { consistent_read: false, write: false, write_unchanged: false, resize: false };
    const READ: Self = Self { consistent_read: true, ..Self::NONE };
    const CHANGE: Self = Self { write_unchanged: false, ..Self::ALL };
    /// What a client lets others do: anything but to change the size.
    const BESIDE_CLIENT: Self = Self { resize: false, ..Self::ALL };
    /// What an image lets others do with its file.
    const BESIDE_IMAGE: Self = Self { consistent_read: true, write_unchanged: true, ..Self::NONE };
    /// What a job lets others do with its target.
    const BESIDE_TARGET: Self = Self { write_unchanged: true, ..Self::NONE };

    fn combine(self, other: Self, with: impl Fn(bool, bool) -> bool) -> Self {
        Self {
            consistent_read: with(self.consistent_read, other.consistent_read),
            write: with(self.write, other.write),
            write_unchanged: with(self.write_unchanged, other.write_unchanged),
            resize: with(self.resize, other.resize),
        }
    }

    fn or(self, other: Self) -> Self {
        self.combine(other, |one, other| one || other)
    }

    fn and(self, other: Self) -> Self {
        self.combine(other, |one, other| one && other)
    }

    fn words(self) -> Value {
        let all = [
            (self.resize, "resize"),
            (self.write_unchanged, "write-unchanged"),
            (self.write, "write"),
            (self.consistent_read, "consistent-read"),
        ];
        all.iter().filter(|(has, _)| *has).map(|(_, word)| *word).collect()
    }
}

/// Somebody who uses nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum User {
    Client(usize),
    Job(String),
    Node(String),
}

impl User {
    fn describe(&self, id: usize) -> Value {
        let (kind, name) = match self {
            Self::Client(_) => ("block-backend", ""),
            Self::Job(id) => ("block-job", id.as_str()),
            Self::Node(name) => ("block-driver", name.as_str()),
        };
        json!({ "name": name, "type": kind, "id": id })
    }
}

struct Edge {
    name: &'static str,
    parent: User,
    child: String,
    needs: Rights,
    shares: Rights,
}

pub(in super::super) fn query(daemon: &Arc<Daemon>) -> Value {
    let nodes = daemon.nodes();
    let jobs = daemon.jobs();
    let mut edges = users(daemon, &jobs);
    // From the top down, so that all users of a node are known when it is its turn. A chain is no longer than this.
    let mut waiting: Vec<_> = nodes.iter().collect();
    while !waiting.is_empty() {
        let before = waiting.len();
        let names: Vec<_> = waiting.iter().map(|entry| entry.node.name().clone()).collect();
        waiting.retain(|entry| {
            let is_below = daemon.graph().roles(&entry.node).iter().any(|role| match role {
                Role::Child { of, .. } | Role::Backing { of } => names.contains(of),
                _ => false,
            });
            if !is_below {
                hand_down(daemon, &nodes, entry, &mut edges);
            }
            is_below
        });
        if waiting.len() == before {
            // A ring, which nobody can make.
            break;
        }
    }
    shown(&nodes, &jobs, &edges)
}

/// The edges from clients and jobs.
fn users(daemon: &Daemon, jobs: &[JobEntry]) -> Vec<Edge> {
    let mut edges = Vec::new();
    let mut clients = 0;
    let mut client = |child: &str, needs, shares| {
        clients += 1;
        let parent = User::Client(clients);
        Edge { name: "root", parent, child: child.to_owned(), needs, shares }
    };
    for export in daemon.exports().iter().rev() {
        let is_writable = matches!(export.place.role(), Role::Export { writable: true, .. });
        let needs = Rights { write: is_writable, ..Rights::READ };
        edges.push(client(export.node().name().as_str(), needs, Rights::BESIDE_CLIENT));
    }
    for job in jobs.iter().rev().filter(|job| !job.target.is_empty()) {
        let needs = Rights { write: true, ..Rights::NONE };
        edges.push(client(&job.target, needs, Rights::BESIDE_TARGET));
    }
    for job in jobs.iter().rev().filter(|job| !job.target.is_empty()) {
        let parent = User::Job(job.job.id().to_owned());
        let edge = |name, child: &str, needs, shares| Edge {
            name,
            parent: parent.clone(),
            child: child.to_owned(),
            needs,
            shares,
        };
        edges.push(edge("target", &job.target, Rights::NONE, Rights::ALL));
        edges.push(edge("source", &job.source, Rights::NONE, Rights::BESIDE_CLIENT));
        edges.push(edge("main node", &job.source, Rights::READ, Rights::BESIDE_CLIENT));
    }
    edges
}

/// Adds the edges from `entry` to the nodes below it.
fn hand_down(daemon: &Daemon, nodes: &[NodeEntry], entry: &NodeEntry, edges: &mut Vec<Edge>) {
    let name = entry.node.name();
    let own = edges.iter().filter(|edge| edge.child == name.as_str());
    let (needs, shares) = own.fold((Rights::NONE, Rights::ALL), |(needs, shares), edge| {
        (needs.or(edge.needs), shares.and(edge.shares))
    });
    for below in nodes.iter().rev() {
        for role in daemon.graph().roles(&below.node) {
            let is_file = entry.child.as_ref() == Some(below.node.name());
            let (edge, needs, shares) = match role {
                Role::Backing { of } if of == *name => {
                    let reads = Rights { consistent_read: needs.consistent_read, ..Rights::NONE };
                    ("backing", reads, Rights::ALL)
                }
                Role::Child { of, .. } if of == *name && entry.driver != "qcow2" => {
                    (if is_file { "file" } else { "image" }, needs, shares)
                }
                Role::Child { of, .. } if of == *name && is_file => {
                    let own = if entry.node.options().read_only { Rights::READ } else { Rights::CHANGE };
                    ("file", own.or(needs), shares.and(Rights::BESIDE_IMAGE))
                }
                Role::Child { of, .. } if of == *name => {
                    let grows = Rights { resize: needs.write, ..needs };
                    ("data-file", grows, shares.and(Rights::BESIDE_CLIENT))
                }
                _ => continue,
            };
            edges.push(Edge {
                name: edge,
                parent: User::Node(name.to_string()),
                child: below.node.name().to_string(),
                needs,
                shares,
            });
        }
    }
}

/// The answer. Ids are given in the order in which QEMU meets everybody, and listed the other way round.
fn shown(nodes: &[NodeEntry], jobs: &[JobEntry], edges: &[Edge]) -> Value {
    let clients = edges.iter().filter(|edge| matches!(edge.parent, User::Client(_)));
    let job_users = jobs.iter().rev().map(|job| User::Job(job.job.id().to_owned()));
    let node_users = nodes.iter().rev().map(|entry| User::Node(entry.node.name().to_string()));
    let everybody = clients.map(|edge| edge.parent.clone()).chain(job_users).chain(node_users);
    let mut ids = BTreeMap::new();
    let mut id_of = |user: &User| {
        let next = ids.len() + 1;
        *ids.entry(user.clone()).or_insert(next)
    };
    let (mut listed, mut described) = (Vec::new(), Vec::new());
    for user in everybody {
        let id = id_of(&user);
        listed.push(user.describe(id));
        let rank = |edge: &&Edge| match edge.name {
            "file" | "main node" => 1,
            _ => 0,
        };
        let mut own: Vec<_> = edges.iter().filter(|edge| edge.parent == user).collect();
        own.sort_by_key(rank);
        // One whose node has gone meanwhile is left out.
        for edge in own.into_iter().filter(|edge| find(nodes, &edge.child).is_some()) {
            described.push(json!({
                "name": edge.name,
                "parent": id,
                "shared-perm": edge.shares.words(),
                "perm": edge.needs.words(),
                "child": id_of(&User::Node(edge.child.clone())),
            }));
        }
    }
    listed.reverse();
    described.reverse();
    json!({ "edges": described, "nodes": listed })
}
