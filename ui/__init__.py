"""Everything Streamlit and Plotly that the workbench's pages share."""
