//! The order of the outputs of a gated layer (GEGLU), whose kernels want values beside their gates.

/// Outputs of a weight (2n, ..), its first half the values and its second half their gates, in
/// groups of `group` values followed by their gates. `None` pads the last group.
pub(super) fn gated_order(n: usize, group: usize) -> impl Iterator<Item = Option<usize>> {
    (0..n.div_ceil(group) * 2 * group).map(move |j| {
        let value = j / (2 * group) * group + j % group;
        (value < n).then_some(if j % (2 * group) < group { value } else { n + value })
    })
}

#[cfg(test)]
mod tests {
    use super::gated_order;

    #[test]
    fn values_and_gates_alternate_in_groups() {
        let order = |n, group| gated_order(n, group).collect::<Vec<_>>();
        assert_eq!(order(2, 1), [Some(0), Some(2), Some(1), Some(3)]);
        let padded = [Some(0), Some(1), Some(3), Some(4), Some(2), None, Some(5), None];
        assert_eq!(order(3, 2), padded);
    }
}
