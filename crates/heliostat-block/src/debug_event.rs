//! [`DebugEvent`]: moments inside a driver at which a fault injector below can act.
//!
//! Names and meaning are those of QEMU's `BlkdebugEvent`. Raised by drivers on the storage that they stand on
//! ([`crate::storage::Storage::raise`]); only [`crate::driver::fault::FaultInjector`] listens. Knows no rules.

macro_rules! events {
    ($($variant:ident $name:literal $about:literal,)*) => {
        /// A moment inside a driver.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DebugEvent {
            $(#[doc = $about] $variant,)*
        }

        impl DebugEvent {
            /// All of them, in QEMU's order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Their names, in the same order.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// QEMU's name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

events! {
    L1Update "l1_update" "An L1 entry is written.",
    L1GrowAllocTable "l1_grow_alloc_table" "A longer L1 table gets its place.",
    L1GrowWriteTable "l1_grow_write_table" "A longer L1 table is written.",
    L1GrowActivateTable "l1_grow_activate_table" "The header is made to name a longer L1 table.",
    L2Load "l2_load" "A part of an L2 table is read.",
    L2Update "l2_update" "A part of an L2 table is written.",
    L2UpdateCompressed "l2_update_compressed" "An entry of a compressed cluster is made.",
    L2AllocCowRead "l2_alloc_cow_read" "A shared L2 table is read to be copied.",
    L2AllocWrite "l2_alloc_write" "A new L2 table gets its contents.",
    ReadAio "read_aio" "Guest data is read.",
    ReadBackingAio "read_backing_aio" "Guest data is read from what the image stands on.",
    ReadCompressed "read_compressed" "A compressed cluster is read.",
    WriteAio "write_aio" "Guest data is written.",
    WriteCompressed "write_compressed" "A compressed cluster is written.",
    VmstateLoad "vmstate_load" "A machine's state is read.",
    VmstateSave "vmstate_save" "A machine's state is written.",
    CowRead "cow_read" "What surrounds a write in its cluster is read.",
    CowWrite "cow_write" "What surrounds a write in its cluster is written.",
    ReftableLoad "reftable_load" "The refcount table is read.",
    ReftableGrow "reftable_grow" "The refcount table becomes longer.",
    ReftableUpdate "reftable_update" "The refcount table is written.",
    RefblockLoad "refblock_load" "A part of a refcount block is read.",
    RefblockUpdate "refblock_update" "A refcount block is written.",
    RefblockUpdatePart "refblock_update_part" "A part of a refcount block is written.",
    RefblockAlloc "refblock_alloc" "A new refcount block gets its place.",
    RefblockAllocHookup "refblock_alloc_hookup" "A new refcount block is entered in the table.",
    RefblockAllocWrite "refblock_alloc_write" "A new refcount block is written.",
    RefblockAllocWriteBlocks "refblock_alloc_write_blocks" "Refcount blocks for a longer table are written.",
    RefblockAllocWriteTable "refblock_alloc_write_table" "A longer refcount table is written.",
    RefblockAllocSwitchTable "refblock_alloc_switch_table" "The header is made to name a longer refcount table.",
    ClusterAlloc "cluster_alloc" "Clusters get their place.",
    ClusterAllocBytes "cluster_alloc_bytes" "Parts of a cluster get their place.",
    ClusterFree "cluster_free" "Clusters are given up.",
    FlushToOs "flush_to_os" "A flush begins.",
    FlushToDisk "flush_to_disk" "What was written is made durable.",
    PwritevRmwHead "pwritev_rmw_head" "The block at an unaligned write's start is about to be read.",
    PwritevRmwAfterHead "pwritev_rmw_after_head" "The block at an unaligned write's start has been read.",
    PwritevRmwTail "pwritev_rmw_tail" "The block at an unaligned write's end is about to be read.",
    PwritevRmwAfterTail "pwritev_rmw_after_tail" "The block at an unaligned write's end has been read.",
    Pwritev "pwritev" "A write reaches the injector itself.",
    PwritevZero "pwritev_zero" "Zeroes reach the injector itself.",
    PwritevDone "pwritev_done" "A write has left the injector itself.",
    EmptyImagePrepare "empty_image_prepare" "An image is about to be emptied.",
    L1ShrinkWriteTable "l1_shrink_write_table" "The end of an L1 table is cleared.",
    L1ShrinkFreeL2Clusters "l1_shrink_free_l2_clusters" "L2 tables of what was cut off are given up.",
    CorWrite "cor_write" "What was read from below is about to be copied up.",
    ClusterAllocSpace "cluster_alloc_space" "New clusters are made zero before their data is written.",
    None "none" "The injector has been made.",
}

impl DebugEvent {
    /// The event of that name.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|event| event.name() == name)
    }
}
