//! [`Filter`]: the drivers that pass requests on to another node. A closed set, so an enum.
//!
//! Each is a storage over a [`NodeStorage`]; what all have in common stands here. Made when an operator adds one by
//! name; nothing else puts one into a graph.

use std::sync::Arc;

use super::copy_on_read::CopyOnRead;
use super::fault::FaultInjector;
use super::preallocate::Preallocate;
use super::throttle::Throttle;
use crate::debug_event::DebugEvent;
use crate::node::Node;
use crate::node_storage::NodeStorage;
use crate::storage::{IoFuture, Storage, pass};

/// A driver that passes requests on.
pub enum Filter {
    /// Lets requests fail and holds them up, by rules (`blkdebug`).
    Faults(Arc<FaultInjector>),
    /// Lets requests wait so that limits are kept (`throttle`).
    Throttle(Throttle),
    /// Keeps what is read from below (`copy-on-read`).
    CopyOnRead(CopyOnRead),
    /// Makes room ahead of writes (`preallocate`).
    Preallocate(Preallocate),
}

impl Filter {
    /// It, as what takes requests.
    pub(crate) fn storage(&self) -> &dyn Storage {
        match self {
            Self::Faults(injector) => &**injector,
            Self::Throttle(throttle) => throttle,
            Self::CopyOnRead(copy) => copy,
            Self::Preallocate(preallocate) => preallocate,
        }
    }

    fn below(&self) -> &NodeStorage {
        match self {
            Self::Faults(injector) => injector.below(),
            Self::Throttle(throttle) => throttle.below(),
            Self::CopyOnRead(copy) => copy.below(),
            Self::Preallocate(preallocate) => preallocate.below(),
        }
    }

    /// The node to which requests go now.
    pub(crate) fn child(&self) -> Arc<Node> {
        self.below().node()
    }

    /// Flushes it. As every driver does, it says so to what is below.
    pub(crate) fn flush(&self) -> IoFuture<'_, ()> {
        IoFuture::pending(async move {
            pass(self.below(), DebugEvent::FlushToOs).await;
            pass(self.below(), DebugEvent::FlushToDisk).await;
            self.storage().flush().await
        })
    }
}
