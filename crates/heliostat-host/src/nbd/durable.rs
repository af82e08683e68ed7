//! Durable changes on connections of which some know them and others do not. Called by the storage.

use heliostat_block::nbd::link::LinkError;
use heliostat_block::storage::Durability;

/// Carries out a change. Says whether it is as durable as it must be; else a flush is to come.
///
/// `is_offered` is what the first connection says of durable writes; a later one may be without.
pub(super) async fn durably<F: AsyncFn(Durability) -> Result<(), LinkError>>(
    durability: Durability,
    is_offered: bool,
    change: F,
) -> Result<bool, LinkError> {
    if durability == Durability::Fua && is_offered {
        match change(durability).await {
            Err(LinkError::NotOffered) => {}
            result => return result.map(|()| true),
        }
    }
    change(Durability::Cached).await?;
    Ok(durability == Durability::Cached)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::runtime::block_on;

    #[test]
    fn a_durable_write_to_a_server_that_does_not_know_it_any_more_is_written_and_flushed() {
        use Durability::{Cached, Fua};
        let lost = LinkError::Lost("gone".to_owned());
        let table = [
            (Fua, true, Ok(()), Ok(true), vec![Fua]),
            (Fua, true, Err(LinkError::NotOffered), Ok(false), vec![Fua, Cached]),
            (Fua, true, Err(lost.clone()), Err(lost), vec![Fua]),
            (Fua, false, Ok(()), Ok(false), vec![Cached]),
            (Cached, true, Ok(()), Ok(true), vec![Cached]),
        ];
        for (durability, is_offered, of_fua, expected, asked) in table {
            let seen = RefCell::new(Vec::new());
            let change = async |durability: Durability| {
                seen.borrow_mut().push(durability);
                if durability == Fua { of_fua.clone() } else { Ok(()) }
            };
            let result = block_on(durably(durability, is_offered, change)).unwrap();
            assert_eq!((result, seen.into_inner()), (expected, asked));
        }
    }
}
